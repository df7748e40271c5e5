# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU backend: one pass over the tile, see csrc/cpu/row_kernels.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import RowSums
from ..types import LogitMap
from . import UpstreamGradient, operators


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
    named = dict(zip(operators.SUMS + operators.STATISTICS, sums, strict=True))
    return RowSums(**named, best_index=best_index)


def logit_grad(
    tile: Tensor, target: Tensor, upstream: UpstreamGradient, bias: Tensor | None, map: LogitMap
) -> None:
    torch.ops.fastpref.logit_grad_(tile, target, *upstream, bias, map.scale, map.cap)
