# SPDX-License-Identifier: Apache-2.0
"""The cpp backend: the compiled operators on CPU tensors (csrc/cpu/row_kernels.inl)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from ..rows import Scored, TargetLogits
from ..slab import Products, Projection, Slab
from ..statistics import RowScores, RowSums
from ..types import LogitMap
from . import UpstreamGradient
from . import fakes as fakes  # which registers them
from . import torch as torch_backend


def unavailable_reason(device_type: str) -> str | None:
    """Why the cpp backend cannot serve tensors on ``device_type``, or None when it can."""
    if device_type != "cpu":
        return f"the cpp backend runs on CPU tensors, got {device_type}; use backend='auto'"
    return _extension.ops_unavailable_reason()


def exp_rows(
    products: Products, target: Tensor, anchor: Tensor, write: bool, statistics: bool
) -> RowSums:
    tile, bias, map = products
    sums, best_index = torch.ops.fastpref.exp_rows_(
        tile, target, anchor, bias, *map, write, statistics
    )
    return RowSums.of(sums, best_index if statistics else None)


def logit_grad(products: Products, target: Tensor, upstream: UpstreamGradient) -> None:
    tile, bias, map = products
    torch.ops.fastpref.logit_grad_(tile, target, *upstream, bias, *map)


def temporary_bytes(
    rows: int, cols: int, device_type: str, dtype: torch.dtype, statistics: bool
) -> int:
    """Most memory that a pass over a (rows, cols) tile takes beside it: rows live in cache."""
    return 0


def target_logits(hidden: Tensor, slab: Slab, target: Tensor) -> TargetLogits:
    weight, bias, map = slab
    # Weights that lie transposed are rare; the operator wants contiguous rows.
    if hidden.stride(1) != 1 or weight.stride(1) != 1:
        return torch_backend.target_logits(hidden, slab, target)
    return TargetLogits(*torch.ops.fastpref.target_logits(hidden, weight, target, bias, *map[:2]))


def settle(
    sums: RowSums, own: TargetLogits, exps: Tensor | None, map: LogitMap
) -> tuple[RowScores, Tensor]:
    *scores, scale = torch.ops.fastpref.settle_rows_(
        exps, sums.anchor, sums.sum, sums.offset, sums.best, *own, *map[:2]
    )
    return RowScores(*scores), scale


def score_rows(projection: Projection, write: bool, statistics: bool) -> Scored:
    """``target_logits``, ``exp_rows`` and ``settle`` by one operator; rows of hidden states and
    weight lie contiguous, and none has a factor."""
    hidden, (weight, bias, map), tile, target = projection
    numbers, best_index = torch.ops.fastpref.score_rows_(
        tile, hidden, weight, target, bias, *map[:2], write, statistics
    )
    _, logit, *sums, logp, anchor, norm, log_norm, scale = numbers.unbind()
    own = RowSums.of(sums, best_index if statistics else None)
    return Scored(logit, own, RowScores(logp, anchor, norm, log_norm), scale)


def gradient_factors(gradient: Tensor, scale: Tensor, rate: float) -> Tensor:
    factors: Tensor = torch.ops.fastpref.gradient_factors(gradient, scale, rate)
    return factors


def scale_rows(rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    if rows.stride(1) != 1 or out.stride(1) != 1:
        return torch_backend.scale_rows(rows, factor, out)
    torch.ops.fastpref.scale_rows_(out, rows, factor)
    return out
