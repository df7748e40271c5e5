# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU backend: one pass over the tile, see csrc/cpu/row_kernels.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import RowSums
from ..types import LogitMap
from . import UpstreamGradient


def exp_rows(
    tile: Tensor,
    target: Tensor,
    anchor: Tensor,
    bias: Tensor | None,
    map: LogitMap,
    write: bool,
    statistics: bool,
) -> RowSums:
    sums, best_index = torch.ops.fastpref.exp_rows_(
        tile, target, anchor, bias, map.scale, map.cap, write, statistics
    )
    if not statistics:
        return RowSums(*sums)
    anchor, total_exp, offset, best, weighted, squares, total = sums
    return RowSums(anchor, total_exp, offset, best, best_index, weighted, squares, total)


def logit_grad(
    tile: Tensor, target: Tensor, upstream: UpstreamGradient, bias: Tensor | None, map: LogitMap
) -> None:
    torch.ops.fastpref.logit_grad_(tile, target, *upstream, bias, map.scale, map.cap)
