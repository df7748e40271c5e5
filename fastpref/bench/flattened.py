# SPDX-License-Identifier: Apache-2.0
"""The fused kernels on flattened tiles and on those of every day, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..kernels import tiles

ELEMENT = torch.bfloat16.itemsize  # what the lanes are measured in


def unavailable(capability: tuple[int, int]) -> str | None:
    chip = tiles.chip_of(capability)
    if chip is not None and tiles.flattenable(chip, ELEMENT):
        return None
    return "its tiles are not flattened on compute capability {}.{}".format(*capability)


@contextlib.contextmanager
def with_flattened_tiles() -> Iterator[None]:
    """Tiles flattened, wherever they can be, while the context lasts."""
    before = dict(tiles.CHIPS)
    tiles.CHIPS.update({key: tiles.flattened(chip) for key, chip in before.items()})
    try:
        yield
    finally:
        tiles.CHIPS.update(before)
