# SPDX-License-Identifier: Apache-2.0
"""Which tile linear_exp.py and reanchor.py work in on which chip: a table, so that a run never
stops to tune and every run computes the same.

Chosen by what the compiler reports for each target (``python -m fastpref kernels``): the largest
tile that spills nothing and leaves its shared memory within the chip's. None was timed yet.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TileShape:
    """A tile of a product, and how its program runs."""

    rows: int
    cols: int
    width: int  # of one step along H
    warps: int
    stages: int
    halves: bool = False  # the epilogue in two halves of the columns
    group_rows: int = 16  # row tiles that share a sweep over the vocabulary
    resident: int = 1  # programs on one multiprocessor


@dataclass(frozen=True)
class Tiles:
    """Of all rows, and of flagged rows, which are gathered through pointers. Both have the same
    columns, so that their sums lie alike."""

    ordinary: TileShape
    flagged: TileShape


@dataclass(frozen=True)
class Chip:
    """Tiles of one compute capability, by the width of an input element in bytes."""

    shared_memory: int  # bytes that one program may take
    descriptors: bool
    exps: dict[int, Tiles]
    statistics: dict[int, Tiles]


_SINGLE = Tiles(
    TileShape(64, 128, 32, warps=8, stages=3), TileShape(64, 128, 32, warps=8, stages=3)
)
_AMPERE = Tiles(
    TileShape(128, 128, 32, warps=8, stages=3), TileShape(64, 128, 32, warps=8, stages=3)
)
_WIDE = Tiles(
    TileShape(128, 256, 64, warps=8, stages=3, halves=True),
    TileShape(64, 256, 64, warps=8, stages=3, halves=True),
)
_STATISTICS = Tiles(
    TileShape(128, 128, 64, warps=8, stages=3), TileShape(64, 128, 64, warps=8, stages=3)
)

CHIPS = {
    # 8.6 and 8.9 have the least of their kind, 8.0 has 163 KiB.
    80: Chip(99 << 10, False, {2: _AMPERE, 4: _SINGLE}, {2: _AMPERE, 4: _SINGLE}),
    90: Chip(227 << 10, True, {2: _WIDE, 4: _SINGLE}, {2: _STATISTICS, 4: _SINGLE}),
    100: Chip(227 << 10, True, {2: _WIDE, 4: _SINGLE}, {2: _STATISTICS, 4: _SINGLE}),
}

# For Triton's interpreter, which runs one tile after the other: several tiles in small tests. They
# are of one size, so that a row's products round alike in all of them.
_SMALL = TileShape(32, 64, 32, warps=4, stages=1, group_rows=2)
_SMALL_HALVES = TileShape(32, 64, 32, warps=4, stages=1, halves=True, group_rows=2)
INTERPRETED = Chip(
    0,
    False,
    {2: Tiles(_SMALL, _SMALL_HALVES), 4: Tiles(_SMALL_HALVES, _SMALL)},
    dict.fromkeys((2, 4), Tiles(_SMALL, _SMALL)),
)


def chip_of(capability: tuple[int, int]) -> Chip:
    """The newest known chip that is not newer than ``capability``."""
    number = 10 * capability[0] + capability[1]
    return CHIPS[max(known for known in CHIPS if known <= number)]
