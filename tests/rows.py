# SPDX-License-Identifier: Apache-2.0
"""Rows that take every way through exp_rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.scoring.types import LogitMap, statistics_dtype


class Rows(NamedTuple):
    """Raw products between cells that no kernel may touch, and what comes with them."""

    guarded: Tensor
    tile: Tensor  # rows begin at any address
    target: Tensor
    anchor: Tensor
    bias: Tensor | None
    logit: Tensor  # float64
    slope: Tensor
    own: Tensor  # the target's logit, -inf where it is not in the tile


def make_rows(dtype: torch.dtype, cols: int, map: LogitMap) -> Rows:
    generator = torch.Generator().manual_seed(cols)
    raw = 3 * torch.randn(12, cols, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, cols - 1, cols // 2, -1, cols, 6, 7, 1, 2, 3, 4, 5])
    low, late, early = -25.0, 2 * cols // 3, cols // 7
    raw[5, min(6, cols - 1)] = 50  # its target's, which is no anchor
    raw[6, late] = 90  # anchored too low from here on
    raw[7, early], raw[7, late] = 40, 90
    raw[8, 0] = raw[8, -1] = 60
    raw[9, ::3] = -torch.inf
    raw[10] = -torch.inf
    raw[10, min(4, cols - 1)] = 1  # its target's alone
    raw[11, [early, late]] = 30  # the first is best
    guarded = torch.full((12, cols + 3), 7.0, dtype=dtype)
    tile = guarded[:, 1 : cols + 1]
    tile.copy_(raw)
    exact = statistics_dtype(dtype)
    bias = torch.randn(cols, generator=generator, dtype=exact) if map.scale != 1 else None
    z = tile.double() if bias is None else tile.double() + bias.double()
    here = (target >= 0) & (target < cols)
    own = map.logit(z).gather(1, target.clamp(0, cols - 1)[:, None])[:, 0]
    own = own.masked_fill(~here, -torch.inf)
    # The engine's target logit comes from another product.
    anchor = own.to(exact) + 1e-3
    anchor[3:6] = torch.tensor([-3.0, torch.nan, -torch.inf])
    anchor[6:9] = low
    return Rows(guarded, tile, target, anchor, bias, map.logit(z), map.slope(z), own)
