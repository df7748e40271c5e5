# SPDX-License-Identifier: Apache-2.0
"""The fused kernels with the loop over tiles flattened into the one over the hidden size, and
without, in one process: the field ``flatten`` of kernels/tiles.py's TileShape."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from ..kernels import tiles


def unavailable() -> str | None:
    if "flatten" in {field.name for field in dataclasses.fields(tiles.TileShape)}:
        return None
    return "the tiles of this version know no flattening"


@contextlib.contextmanager
def with_flattened_tiles(flatten: bool = True) -> Iterator[None]:
    """Ordinary tiles flattened where the loads of one can pass during the epilogue of another, or
    none flattened, while the context lasts. Without the field nothing changes."""
    if unavailable() is not None:
        yield
        return
    before = dict(tiles.CHIPS)
    tiles.CHIPS.update({key: _chip(chip, flatten) for key, chip in before.items()})
    try:
        yield
    finally:
        tiles.CHIPS.update(before)


def _chip(chip: tiles.Chip, flatten: bool) -> tiles.Chip:
    def changed(table: dict[int, tiles.Tiles]) -> dict[int, tiles.Tiles]:
        found = {}
        for size, pair in table.items():
            # Products of float32 do not wait for the epilogue.
            flag: dict[str, Any] = {"flatten": flatten and chip.descriptors and size == 2}
            ordinary = dataclasses.replace(pair.ordinary, **flag)
            found[size] = dataclasses.replace(pair, ordinary=ordinary)
        return found

    return dataclasses.replace(chip, plain=changed(chip.plain), heavy=changed(chip.heavy))
