# SPDX-License-Identifier: Apache-2.0
"""The fused kernels with the loop over tiles flattened into the one over the hidden size, and
without, in one process: the field ``flatten`` of kernels/tiles.py's TileShape."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from ..kernels import tiles


def unavailable() -> str | None:
    if "flatten" in {field.name for field in dataclasses.fields(tiles.TileShape)}:
        return None
    return "the tiles of this version know no flattening"


@contextlib.contextmanager
def with_flattened_tiles(flatten: bool = True) -> Iterator[None]:
    """Every ordinary tile flattened, or none, while the context lasts. Without the field nothing
    changes."""
    if unavailable() is not None:
        yield
        return
    before = dict(tiles.CHIPS)
    tiles.CHIPS.update({key: _chip(chip, flatten) for key, chip in before.items()})
    try:
        yield
    finally:
        tiles.CHIPS.clear()
        tiles.CHIPS.update(before)


def _chip(chip: tiles.Chip, flatten: bool) -> tiles.Chip:
    def changed(table: dict[int, tiles.Tiles]) -> dict[int, tiles.Tiles]:
        return {
            size: dataclasses.replace(
                one,
                ordinary=dataclasses.replace(one.ordinary, flatten=flatten),
            )
            for size, one in table.items()
        }

    return dataclasses.replace(chip, plain=changed(chip.plain), heavy=changed(chip.heavy))
