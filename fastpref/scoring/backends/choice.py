# SPDX-License-Identifier: Apache-2.0
"""Which backend ``auto`` takes on a GPU: the one that was fastest at the nearest measured size.

choice.json holds what ``python -m fastpref bench --suite choice`` measured: a list of objects with
``capability`` (times ten), ``dtype``, ``rows``, ``hidden_size``, ``vocab_size``, and
``milliseconds`` of one forward and backward pass with a frozen head, by backend. A table and not a
trial at run time: all ranks and all runs must choose alike. Where nothing was measured the torch
backend serves.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("choice.json")


class Size(NamedTuple):
    """Of a projection."""

    dtype: torch.dtype
    rows: int  # N
    hidden_size: int  # H
    vocab_size: int  # V


class Entry(NamedTuple):
    capability: int
    size: Size
    milliseconds: dict[str, float]


@functools.cache
def measured() -> tuple[Entry, ...]:
    return tuple(
        Entry(
            one["capability"],
            Size(getattr(torch, one["dtype"]), one["rows"], one["hidden_size"], one["vocab_size"]),
            one["milliseconds"],
        )
        for one in json.loads(TABLE.read_text())
    )


def by_speed(capability: int, size: Size) -> list[str]:
    """Backends at the nearest measured size of this chip and dtype, the fastest first."""
    alike = [
        one for one in measured() if one.capability == capability and one.size.dtype == size.dtype
    ]
    if not alike:
        return ["torch"]
    nearest = min(alike, key=lambda one: _distance(one.size, size))
    return sorted(nearest.milliseconds, key=nearest.milliseconds.__getitem__)


def _distance(one: Size, other: Size) -> float:
    """In doublings of a side."""
    sides = zip(one[1:], other[1:], strict=True)
    return sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in sides)
