# SPDX-License-Identifier: Apache-2.0
"""Preference data from a JSON Lines file, pairs or lists, checked line by line; their split."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from ..objectives.signature import Domain
from . import DemoError, arithmetic

MIN_EXAMPLES = 10
_EXPECTED = (
    'expected a JSON object with the texts "prompt", "chosen" and "rejected", or with the text '
    '"prompt", the list "completions" of two texts or more and the list "rewards" of as many '
    "numbers"
)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and K completions of it; the larger its reward, the better a completion is.

    `numbers` holds the columns an objective asks for, such as ``reward_margin``.
    """

    prompt: str
    completions: Sequence[str]  # K of them, K >= 2
    rewards: Sequence[float]
    numbers: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def pair(
        cls, prompt: str, chosen: str, rejected: str, numbers: Mapping[str, float] | None = None
    ) -> "Example":
        """A list of two, the first of which is preferred."""
        return cls(prompt, (chosen, rejected), (1.0, 0.0), numbers or {})

    @property
    def best(self) -> int:
        """The place of the first completion with the largest reward."""
        return self.rewards.index(max(self.rewards))

    @property
    def worst(self) -> int:
        """The place of the first completion with the smallest reward."""
        return self.rewards.index(min(self.rewards))

    @property
    def chosen(self) -> str:
        """The first best completion."""
        return self.completions[self.best]

    @property
    def rejected(self) -> str:
        """The first worst completion."""
        return self.completions[self.worst]


@dataclass(frozen=True, slots=True)
class Preferences:
    """The examples of a file, or those of `arithmetic`."""

    examples: list[Example]
    undecided: int  # lists that are left out because all their rewards are equal

    def pairs(self) -> "Preferences":
        """Of every example the best and the worst completion alone."""
        pairs = [Example.pair(e.prompt, e.chosen, e.rejected, e.numbers) for e in self.examples]
        return replace(self, examples=pairs)


def load(
    path: Path | None, columns: Mapping[str, Domain] | None = None, least: int = MIN_EXAMPLES
) -> Preferences:
    """What a file with one JSON object a line prefers; blank lines are passed over.

    Args:
        path: a file in UTF-8; None: the pairs of `arithmetic`. Every object has the texts "prompt",
            "chosen" and "rejected"; or "prompt", a list "completions" and a list "rewards". No text
            is blank, and there may be other fields.
        columns: names of further fields that must be there, and the numbers allowed in them. Where
            there is no "reward_margin" it is the difference of "score_chosen" and "score_rejected",
            which for a list are its largest and its smallest reward.
        least: examples that there must be.

    Raises:
        DemoError: naming the file, the line and what was expected there.
    """
    source = named(path)
    try:
        lines = _contents(path).splitlines()
    except OSError as error:
        raise DemoError(f"{source}: cannot be read: {error.strerror}") from None
    examples, undecided = [], 0
    for at, line in enumerate(lines, start=1):
        if line.strip():
            try:
                example = _parse(line, columns or {})
            except ValueError as error:
                raise DemoError(f"{source}, line {at}: {error}") from None
            if example is None:
                undecided += 1
            else:
                examples.append(example)
    if len(examples) < least:
        without = f", without {undecided} lists of equal rewards" if undecided else ""
        raise DemoError(
            f"{source}: {len(examples)} examples{without}, expected at least {least}, one a line"
        )
    return Preferences(examples, undecided)


def named(path: Path | None) -> str:
    """What messages and results call what `load` reads."""
    return arithmetic.NAME if path is None else str(path)


def _contents(path: Path | None) -> bytes:
    if path is not None:
        return path.read_bytes()
    return arithmetic.to_jsonl(arithmetic.make_pairs()).encode()


def _parse(line: bytes, columns: Mapping[str, Domain]) -> Example | None:
    """The example of a line; None if it is a list without a preference."""
    try:
        # An integer that no float can hold becomes an infinity, which no column allows.
        record = json.loads(line.decode("utf-8"), parse_int=float)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason}); {_EXPECTED}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON ({error.msg} at column {error.colno}); {_EXPECTED}"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"found a JSON {_kind(record)}; {_EXPECTED}")
    if "completions" in record and "chosen" not in record:
        completions, rewards = _ranked(record)
        if len(set(rewards)) == 1:
            return None
        record = {"score_chosen": max(rewards), "score_rejected": min(rewards), **record}
    else:
        completions, rewards = [_text(record, name) for name in ("chosen", "rejected")], [1.0, 0.0]
    numbers = {name: _column(record, name, domain) for name, domain in columns.items()}
    return Example(_text(record, "prompt"), completions, rewards, numbers)


def _ranked(record: dict[str, Any]) -> tuple[list[str], list[float]]:
    """The completions of a list and their rewards."""
    completions, rewards = (_list(record, name) for name in ("completions", "rewards"))
    if len(completions) < 2:
        raise ValueError(f'the list "completions" has {len(completions)} of them; {_EXPECTED}')
    if len(rewards) != len(completions):
        raise ValueError(
            f'the list "rewards" has {len(rewards)} numbers for {len(completions)} completions; '
            f"{_EXPECTED}"
        )
    for place, value in enumerate(completions, start=1):
        _check_text(f'text {place} of "completions"', value)
    for place, value in enumerate(rewards, start=1):
        if not isinstance(value, float) or not Domain().contains(value):
            raise ValueError(
                f'number {place} of "rewards" is {value!r}; expected a finite number for every '
                "completion"
            )
    return completions, rewards


def _text(record: dict[str, Any], name: str) -> str:
    value = _field(record, name)
    _check_text(f'the field "{name}"', value)
    return str(value)


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = _field(record, name)
    if not isinstance(value, list):
        raise ValueError(f'the field "{name}" is a {_kind(value)}; {_EXPECTED}')
    return value


def _field(record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise ValueError(f'the field "{name}" is missing; {_EXPECTED}')
    return record[name]


def _check_text(label: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{label} is a {_kind(value)}; {_EXPECTED}")
    if not value.strip():
        raise ValueError(f"{label} is empty; expected some text to score")


def _column(record: dict[str, Any], name: str, domain: Domain) -> float:
    """The number an objective asks for."""
    scores = ("score_chosen", "score_rejected")
    if name == "reward_margin" and name not in record and all(score in record for score in scores):
        chosen, rejected = (_column(record, score, Domain()) for score in scores)
        record = {name: chosen - rejected}
    value = record.get(name)
    if not isinstance(value, float) or not domain.contains(value):
        found = f"is {value!r}" if name in record else "is missing"
        raise ValueError(
            f'the field "{name}" {found}; the objective needs a number there that is {domain}'
        )
    return value


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def split(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and examples held out: an eighth, at most 150, drawn by `seed`."""
    shuffled = list(examples)
    Random(seed).shuffle(shuffled)
    held_out = max(1, min(150, len(examples) // 8))
    return shuffled[held_out:], shuffled[:held_out]
