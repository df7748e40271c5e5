# SPDX-License-Identifier: Apache-2.0
"""Preference pairs from a JSON Lines file, checked line by line, and their split."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from . import DemoError

FIELDS = ("prompt", "chosen", "rejected")
MIN_PAIRS = 10
_EXPECTED = 'expected a JSON object with the text fields "prompt", "chosen" and "rejected"'


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, the completion that is preferred and the one that is not.

    `numbers` holds the columns an objective asks for, such as ``reward_margin``.
    """

    prompt: str
    chosen: str
    rejected: str
    numbers: dict[str, float] = field(default_factory=dict)


def load_pairs(path: Path, numbers: Sequence[str] = ()) -> list[Pair]:
    """The pairs of a file with one JSON object a line; blank lines are passed over.

    Args:
        path: a file in UTF-8. Every object has the texts "prompt", "chosen" and "rejected", none
            of them blank, and may have other fields.
        numbers: names of further fields that must be there and hold finite numbers.

    Raises:
        DemoError: naming the file, the line and what was expected there.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DemoError(f"{path}: cannot be read: {error.strerror}") from None
    pairs = []
    for at, line in enumerate(lines, start=1):
        if line.strip():
            try:
                pairs.append(_parse(line, numbers))
            except ValueError as error:
                raise DemoError(f"{path}, line {at}: {error}") from None
    if len(pairs) < MIN_PAIRS:
        raise DemoError(f"{path}: {len(pairs)} pairs, expected at least {MIN_PAIRS}, one a line")
    return pairs


def _parse(line: bytes, numbers: Sequence[str]) -> Pair:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason}); {_EXPECTED}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON ({error.msg} at column {error.colno}); {_EXPECTED}"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"found a JSON {_kind(record)}; {_EXPECTED}")
    for name in FIELDS:
        if name not in record:
            raise ValueError(f'the field "{name}" is missing; {_EXPECTED}')
        if not isinstance(record[name], str):
            raise ValueError(f'the field "{name}" is a {_kind(record[name])}; {_EXPECTED}')
        if not record[name].strip():
            raise ValueError(f'the field "{name}" is empty; expected some text to score')
    found = {name: _number(record, name) for name in numbers}
    return Pair(record["prompt"], record["chosen"], record["rejected"], found)


def _number(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        found = f"is {value!r}" if name in record else "is missing"
        raise ValueError(f'the field "{name}" {found}; the objective needs a finite number there')
    return float(value)


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def split(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs held out: an eighth of them, at most 150, drawn by `seed`."""
    shuffled = list(pairs)
    Random(seed).shuffle(shuffled)
    held_out = max(1, min(150, len(pairs) // 8))
    return shuffled[held_out:], shuffled[:held_out]
