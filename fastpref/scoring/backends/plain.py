# SPDX-License-Identifier: Apache-2.0
"""The plain torch backend: any device, any dtype, several passes over the tile, no host sync.

What csrc/cpu/row_kernels.inl computes, in torch. The tile is worked on in blocks of rows so that
temporaries in the statistics' dtype stay small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import RowSums, TargetLogits
from ..rows import settle as settle_rows
from ..types import LogitMap, statistics_dtype
from . import UpstreamGradient

# Elements of one temporary, and the most that are alive at once. Launches are what costs on a GPU.
_BLOCK_CPU = 1 << 20
_BLOCK_ELSEWHERE = 1 << 25
_TEMPORARIES = 8
_GUARD = 30.0
_LOWEST_ANCHOR = -1e30


def _exp_difference(logits: Tensor, anchor: Tensor, shifted: Tensor) -> Tensor:
    """exp(logits - anchor), with what rounding lost in ``shifted`` recovered (Knuth's two-sum)."""
    exps = shifted.exp()
    back = shifted - logits
    lost = (logits - (shifted - back)) - (anchor + back)
    return torch.where(exps > 0, exps + exps * lost, exps)


def _raw(tile: Tensor, bias: Tensor | None) -> Tensor:
    raw = tile.to(statistics_dtype(tile.dtype))
    return raw if bias is None else raw + bias


def _block_elements(device_type: str) -> int:
    return _BLOCK_CPU if device_type == "cpu" else _BLOCK_ELSEWHERE


def _block_rows(matrix: Tensor) -> int:
    return max(1, _block_elements(matrix.device.type) // max(1, matrix.shape[1]))


def temporary_bytes(
    rows: int, cols: int, device_type: str, dtype: torch.dtype, statistics: bool
) -> int:
    """Most memory that a pass over a (rows, cols) tile takes beside it."""
    block = max(cols, min(rows * cols, _block_elements(device_type)))
    return _TEMPORARIES * block * statistics_dtype(dtype).itemsize


def exp_rows(
    tile: Tensor,
    target: Tensor,
    anchor: Tensor,
    bias: Tensor | None,
    map: LogitMap,
    write: bool,
    statistics: bool,
) -> RowSums:
    rows = _block_rows(tile)
    parts = [
        _exp_block(tile_, target_, anchor_, bias, map, write, statistics)
        for tile_, target_, anchor_ in zip(
            tile.split(rows), target.split(rows), anchor.split(rows), strict=True
        )
    ]
    columns = zip(*parts, strict=True)
    return RowSums._make(None if one[0] is None else torch.cat(one) for one in columns)


def _exp_block(
    tile: Tensor,
    target: Tensor,
    anchor: Tensor,
    bias: Tensor | None,
    map: LogitMap,
    write: bool,
    statistics: bool,
) -> RowSums:
    raw = _raw(tile, bias)
    logits = map.logit(raw)
    cols = tile.shape[1]
    here = (target >= 0) & (target < cols)
    column = target.clamp(0, cols - 1)[:, None]
    at_column = logits.gather(1, column)[:, 0]
    own = torch.where(here, at_column, -torch.inf)
    best, best_index = logits.max(1) if statistics else (None, None)
    # The target's column is left out; a tile without it must not lose its first column.
    others = logits.scatter(1, column, torch.where(here, -torch.inf, at_column)[:, None])
    highest = others.amax(1)
    keep = anchor.isfinite() & ~(highest - anchor > _GUARD)
    # A row of nothing but -inf takes a finite anchor below every other part's.
    anchor = torch.where(keep, anchor, torch.where(highest == -torch.inf, _LOWEST_ANCHOR, highest))
    shifted = others - anchor[:, None]
    exps = _exp_difference(others, anchor[:, None], shifted)
    total_exp = exps.sum(1)
    weighted = None
    if best is not None:
        # A logit of -inf has no weight.
        weighted = torch.where(exps > 0, exps * (others - best[:, None]), 0.0).sum(1)
    squares = exps.square().sum(1) if statistics else None
    total = None
    if statistics:
        # Not a difference: the target's logit may be -inf.
        total = logits.scatter(1, column, torch.where(here, 0.0, at_column)[:, None]).sum(1)
    offset = torch.zeros_like(anchor)
    if write:
        if tile.dtype == torch.float16:
            # A half holds nothing above 65504: keep probabilities instead.
            norm = total_exp + (own - anchor).exp()
            # Columns of nothing but -inf, the target elsewhere: nothing to scale.
            offset = torch.where(norm == 0, 0.0, norm.log())
            exps = (shifted - offset[:, None]).exp()
        tile.copy_(exps if map.cap == 0 else exps * map.slope(raw))
    return RowSums(anchor, total_exp, offset, best, best_index, weighted, squares, total)


def logit_grad(
    tile: Tensor, target: Tensor, upstream: UpstreamGradient, bias: Tensor | None, map: LogitMap
) -> None:
    rows = _block_rows(tile)
    for start in range(0, tile.shape[0], rows):
        block = slice(start, start + rows)
        here = UpstreamGradient._make(None if one is None else one[block] for one in upstream)
        _logit_grad_block(tile[block], target[block], here, bias, map)


def _logit_grad_block(
    tile: Tensor, target: Tensor, upstream: UpstreamGradient, bias: Tensor | None, map: LogitMap
) -> None:
    anchor, norm, logp, g, h, k, entropy = upstream
    raw = _raw(tile, bias)
    logits = map.logit(raw)
    shifted = logits - anchor[:, None]
    p = _exp_difference(logits, anchor[:, None], shifted) / norm[:, None]
    weight = -g if h is None else h - g
    grad = p * weight[:, None]
    own_p = logp.exp()
    own = -torch.expm1(logp) * g
    if h is not None:
        own = own + own_p * h
    if k is not None and entropy is not None:
        # p log p is 0 where p is, also at a logit of -inf.
        grad = (
            grad
            - torch.where(p == 0, 0.0, p * (shifted + (entropy - norm.log())[:, None])) * k[:, None]
        )
        own = own - torch.where(own_p == 0, 0.0, own_p * (logp + entropy)) * k
    cols = tile.shape[1]
    here = (target >= 0) & (target < cols)
    column = target.clamp(0, cols - 1)[:, None]
    grad = grad.scatter(1, column, torch.where(here, own, grad.gather(1, column)[:, 0])[:, None])
    tile.copy_(grad * map.slope(raw) * map.scale)


def target_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, map: LogitMap
) -> TargetLogits:
    here = (target >= 0) & (target < weight.shape[0])
    index = torch.where(here, target, 0)
    raw = _gather_dot(hidden, weight, index)
    if bias is not None:
        raw += bias[index]
    raw = torch.where(here, raw, torch.nan)
    return TargetLogits(torch.where(here, target, -1), raw, map.logit(raw))


settle = settle_rows


def _gather_dot(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """hidden[i] . weight[index[i]], (rows,) in the statistics' dtype."""
    dtype = statistics_dtype(hidden.dtype)
    rows = _block_rows(hidden)
    parts = [
        (part.to(dtype) * weight.index_select(0, at).to(dtype)).sum(-1)
        for part, at in zip(hidden.split(rows), index.split(rows), strict=True)
    ]
    return torch.cat(parts)


def scale_rows(rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    return out.copy_(rows * factor[:, None])
