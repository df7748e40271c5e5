# SPDX-License-Identifier: Apache-2.0
"""Which tile linear_exp.py, linear_grad.py and reanchor.py work in on which chip: a table, so that
a run never stops to tune and every run computes the same.

Chosen by what the compiler reports for each target (``python -m fastpref kernels``): the largest
tile that spills nothing and leaves its shared memory within the chip's. None was timed yet.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TileShape:
    """A tile of a product, and how its program runs."""

    rows: int
    cols: int
    width: int  # of one step along H
    warps: int
    stages: int
    slices: int = 1  # of the columns, that the epilogue takes one after the other
    # Of a thread at most. Left to itself (None) the compiler may spill a few rather than have one
    # program less on a multiprocessor.
    registers: int | None = None
    group_rows: int = 16  # row tiles that share a sweep over the vocabulary
    resident: int = 1  # programs on one multiprocessor
    # Whether its programs load their next tile during the epilogue of this one: slower where
    # several share a multiprocessor, which overlap as it is.
    flatten: bool = False

    @property
    def slice_cols(self) -> int:
        return self.cols // self.slices


@dataclass(frozen=True)
class Tiles:
    """Of all rows, and of flagged rows, which are gathered through pointers. Both have the same
    columns: their sums lie alike."""

    ordinary: TileShape
    flagged: TileShape


@dataclass(frozen=True)
class Chip:
    """Tiles of one compute capability, by the width of an input element in bytes."""

    shared_memory: int  # bytes that one program may take
    descriptors: bool
    plain: dict[int, Tiles]
    heavy: dict[int, Tiles]  # with statistics, a cap, or gradients in the epilogue
    flattenable: bool = False  # whether a loop over tiles may be one with that over H


def _tiles(
    rows: tuple[int, int],
    cols: int,
    width: int,
    slices: int | tuple[int, int],
    warps: tuple[int, int] = (8, 8),
    registers: tuple[int | None, int | None] = (None, None),
) -> Tiles:
    """Pairs: of the ordinary tile, of the flagged one."""
    pair = slices if isinstance(slices, tuple) else (slices, slices)
    ordinary, flagged = (
        TileShape(rows[i], cols, width, warps[i], 3, pair[i], registers[i]) for i in range(2)
    )
    return Tiles(ordinary, flagged)


CHIPS = {
    80: Chip(
        # 8.6 and 8.9 have the least of their kind, 8.0 has 163 KiB.
        shared_memory=99 << 10,
        descriptors=False,
        plain={
            2: _tiles((128, 64), 128, 32, 2),
            4: _tiles((64, 64), 128, 16, 1, registers=(168, None)),
        },
        heavy={
            2: _tiles((128, 64), 128, 32, 4),
            4: _tiles((64, 64), 64, 16, 1, (8, 4), (168, None)),
        },
    ),
    90: Chip(
        shared_memory=227 << 10,
        descriptors=True,
        plain={2: _tiles((128, 64), 256, 64, (4, 1)), 4: _tiles((64, 64), 64, 16, 1, (8, 4))},
        heavy={2: _tiles((128, 64), 128, 64, 4), 4: _tiles((64, 64), 64, 16, 1, (8, 4))},
        flattenable=True,
    ),
    100: Chip(
        shared_memory=227 << 10,
        descriptors=True,
        # In slices the accumulators leave tensor memory twice: that spills, or does not compile.
        # Flattened, 56 to 136 bytes are spilled.
        plain={2: _tiles((128, 64), 256, 64, 1), 4: _tiles((64, 64), 64, 16, 1, (8, 4))},
        heavy={
            2: _tiles((128, 64), 64, 64, 1, registers=(None, 168)),
            4: _tiles((64, 64), 64, 16, 1, (8, 4), (168, None)),
        },
    ),
    # Blackwell without tensor memory and with 99 KiB: its matrix units are those of 8.0.
    120: Chip(
        shared_memory=99 << 10,
        descriptors=False,
        plain={
            2: _tiles((128, 64), 128, 32, 2, registers=(None, 168)),
            4: _tiles((64, 64), 128, 16, 1),
        },
        heavy={2: _tiles((64, 64), 128, 32, 4), 4: _tiles((64, 64), 64, 16, 1, (8, 4))},
    ),
}


# For Triton's interpreter, which runs one tile after the other: several tiles in small tests. They
# are of one size, so that a row's products round alike in all of them.
def _small(slices: int) -> Tiles:
    shape = TileShape(32, 64, 32, warps=4, stages=1, slices=slices, group_rows=2)
    return Tiles(shape, shape)


INTERPRETED = Chip(0, False, {2: _small(4), 4: _small(2)}, {2: _small(2), 4: _small(1)})


# 11.0 has the tensor memory, the matrix instructions and the 227 KiB of 10.0.
_OF_MAJOR = {8: 80, 9: 90, 10: 100, 11: 100, 12: 120}


def chip_of(capability: tuple[int, int]) -> Chip | None:
    """The chip that ``capability`` is compiled and tiled as; None for one that nobody compiled
    these kernels for: what a newer one takes is not known from an older."""
    known = _OF_MAJOR.get(capability[0])
    return None if known is None else CHIPS[known]


def in_tf32(pair: Tiles) -> Tiles:
    """Tiles of float32 whose products run on the matrix units, which take longer steps along H; in
    steps as long, exact products spill."""
    ordinary = replace(pair.ordinary, width=32, registers=168)
    return Tiles(ordinary, replace(pair.flagged, width=32))


def flattenable(chip: Chip, itemsize: int) -> bool:
    """Whether ``flattened`` changes tiles of inputs of that size: products of float32 are not what
    waits for the epilogue."""
    return chip.flattenable and itemsize == 2


def flattened(chip: Chip) -> Chip:
    """``chip`` with ``flatten`` where it can be: ``CHIPS[90] = flattened(CHIPS[90])`` makes this
    process take it."""

    def of(table: dict[int, Tiles]) -> dict[int, Tiles]:
        return {
            size: replace(pair, ordinary=replace(pair.ordinary, flatten=True))
            if flattenable(chip, size)
            else pair
            for size, pair in table.items()
        }

    return replace(chip, plain=of(chip.plain), heavy=of(chip.heavy))
