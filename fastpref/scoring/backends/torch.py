# SPDX-License-Identifier: Apache-2.0
"""The torch backend: any device, any dtype, no host sync, few passes over the tile.

What csrc/cpu/row_kernels.inl computes, in torch, for a tile worked on in blocks of rows. With x the
logits (-inf at the target), h the largest and j its column, softmax gives q = exp(x - h) / Z in one
operator, and everything follows from it: Z = 1 / q_j, and about any anchor a

    e = exp(x - a) = f q,   f = exp(h - a) Z,   sum e = f sum q,   sum e^2 = f^2 sum q^2,
    sum e (x - best) = f (sum q (x - h) + (h - best) sum q).

sum q is what softmax's Z lacks: on CPU it adds one number after another. Of 16-bit tiles it is
taken for 1, and sum q (x - h) for log Z + sum q log q, since their logits are rounded to 2^-9 or
2^-11.

Bytes a logit of a 16-bit tile without bias and cap, where casts are made in registers, with each
operand of an operator counted once: 18 forward, 24 with exponentials written, 24 more with
statistics; 20 for the gradient, 32 with that of an entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..products import split
from ..rows import TargetLogits, exponential_scale, row_scores, write_target
from ..slab import Products, Slab
from ..statistics import RowScores, RowSums
from ..types import LogitMap, statistics_dtype
from . import UpstreamGradient

# Elements of one temporary, and the most that are alive at once. Launches are what costs on a GPU.
_BLOCK_CPU = 1 << 20
_BLOCK_ELSEWHERE = 1 << 24
_TEMPORARIES = 5
_GUARD = 30.0
# Beyond every logit. A row of nothing but -inf takes a finite anchor below every other part's.
_LOWEST = -1e30


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


def _is_low(tile: Tensor) -> bool:
    return tile.dtype.itemsize == 2


def _is_direct(products: Products) -> bool:
    """Whether logits need not be rounded as they were when the row was scored: they are so much
    coarser in the first place."""
    return _is_low(products.tile) and products.bias is None and products.map.cap == 0


def with_bias(products: Products) -> Tensor:
    """In the statistics' dtype; the tile itself where that changes nothing."""
    tile, bias, _ = products
    return tile.to(statistics_dtype(tile.dtype)) if bias is None else tile + bias[None]


def logits(products: Products, dtype: torch.dtype | None = None) -> Tensor:
    """In ``dtype`` (None: the statistics'); a tensor of their own."""
    tile, bias, map = products
    if bias is None and map.cap == 0:
        return tile * scale_of(products, dtype)
    found = map.logit(with_bias(products))
    return found if dtype is None else found.to(dtype)


def scale_of(products: Products, dtype: torch.dtype | None = None) -> Tensor:
    """(1, 1) or (rows, 1), in ``dtype`` (None: the statistics'). A factor with dimensions widens a
    tile as it is read; a number does not."""
    dtype = dtype or statistics_dtype(products.tile.dtype)
    rate = products.map.rate(products.tile)
    if isinstance(rate, Tensor):
        return rate.to(dtype)
    return torch.full((1, 1), rate, dtype=dtype, device=products.tile.device)


class _Targets(NamedTuple):
    """One element of each row of a block: the target's where ``here``, else any."""

    here: Tensor
    place: tuple[Tensor, Tensor]  # row and column

    def put(self, matrix: Tensor, values: Tensor | float) -> None:
        # index_put_ touches one element a row; scatter_ on CPU copies the whole matrix.
        kept = torch.where(self.here, values, matrix[self.place])
        matrix.index_put_(self.place, kept.to(matrix.dtype))


def _targets(target: Tensor, cols: int) -> _Targets:
    rows = torch.arange(target.shape[0], dtype=target.dtype, device=target.device)
    return _Targets((target >= 0) & (target < cols), (rows, target.clamp(0, cols - 1)))


class _BlockSums(NamedTuple):
    """Of a block's columns but the target's, each (rows,)."""

    anchor: Tensor
    sum: Tensor
    offset: Tensor
    factor: Tensor  # f
    own: Tensor  # the target's logit, -inf where it is elsewhere
    highest: Tensor  # h
    column: Tensor  # j, the first of equal ones
    share: Tensor | None = None  # sum q, where it is not taken for 1
    moment: Tensor | None = None  # sum q (x - h)
    squares: Tensor | None = None  # sum q^2
    total: Tensor | None = None  # sum of the logits, under a cap


def exp_rows(
    products: Products, target: Tensor, anchor: Tensor, write: bool, statistics: bool
) -> RowSums:
    total = products.tile.shape[0]
    # At least one block, which may be of no rows.
    parts = [
        _exp_block(products.of_rows(rows), target[rows], anchor[rows], write, statistics)
        for rows in split(0, max(1, total), _block_rows(products.tile))
    ]
    columns = zip(*parts, strict=True)
    sums = _BlockSums._make(None if one[0] is None else torch.cat(one) for one in columns)
    found = RowSums(sums.anchor, sums.sum, sums.offset)
    return _with_statistics(found, sums, target) if statistics else found


def _exp_block(
    products: Products, target: Tensor, anchor: Tensor, write: bool, statistics: bool
) -> _BlockSums:
    tile, x = products.tile, logits(products)
    targets = _targets(target, tile.shape[1])
    own = torch.where(targets.here, x[targets.place], -torch.inf)
    total = None
    if statistics and products.map.cap != 0:
        # Not a difference: the target's logit may be -inf.
        targets.put(x, 0.0)
        total = x.sum(1)
    targets.put(x, -torch.inf)
    column = x.argmax(1)
    best = (targets.place[0], column)
    highest = x[best]
    floor = highest.clamp(min=_LOWEST)
    # Else softmax of a row of nothing but -inf is NaN.
    x.index_put_(best, floor)
    q = x.softmax(1)
    top = q[best]
    keep = anchor.isfinite() & ~(floor - anchor > _GUARD)
    anchor = torch.where(keep, anchor, floor)
    wide = (highest.double() - anchor.double()).exp() / top.double()
    factor = wide.to(anchor.dtype)
    share = moment = squares = None
    if not _is_low(tile):
        share = q.sum(1)
        if statistics:
            moment = x.sub_(floor[:, None]).clamp_(min=_LOWEST).mul_(q).sum(1)
            # A norm adds one after another on CPU, too.
            squares = q.square().sum(1)
    elif statistics:
        moment = -torch.special.entr(q).sum(1) - top.log()
        squares = torch.linalg.vector_norm(q, dim=1).square()
    del x
    sum = factor if share is None else (wide * share).to(anchor.dtype)
    offset = torch.zeros_like(anchor)
    if write:
        written = factor
        if tile.dtype == torch.float16:
            # A half holds nothing above 65504: keep probabilities instead.
            norm = sum + (own - anchor).exp()
            # Columns of nothing but -inf, the target elsewhere: nothing to scale.
            offset = torch.where(norm == 0, 0.0, norm.log())
            written = torch.where(norm == 0, 0.0, factor / norm)
        _write(products, q, written[:, None])
    found = anchor, sum, offset, factor, own, highest, column
    return _BlockSums(*found, share, moment, squares, total)


def _write(products: Products, rows: Tensor, factor: Tensor) -> None:
    """rows times factor times the map's slope into the tile of raw products; uses ``rows`` up."""
    if products.map.cap == 0:
        torch.mul(rows, factor, out=products.tile)
    else:
        slope = products.map.slope(with_bias(products))
        products.tile.copy_(rows.mul_(factor).mul_(slope))


def _with_statistics(found: RowSums, sums: _BlockSums, target: Tensor) -> RowSums:
    moment, squares = sums.moment, sums.squares
    if moment is None or squares is None:
        raise TypeError("sums of a block without statistics")
    own, highest = sums.own, sums.highest
    best = torch.maximum(own, highest)
    # Of equal ones the first; elsewhere own is -inf, and the target may be any number.
    first = (own == highest) & (own > -torch.inf) & (target < sums.column)
    share = 1.0 if sums.share is None else sums.share.double()
    shift = (highest.double() - best.double()) * share
    weighted = sums.factor.double() * (moment.double() + shift)
    return found._replace(
        best=best,
        best_index=torch.where((own > highest) | own.isnan() | first, target, sums.column),
        # A logit of -inf has no weight.
        weighted=torch.where(found.sum > 0, weighted, 0.0).to(best.dtype),
        squares=(sums.factor.double().square() * squares.double()).to(best.dtype),
        total=sums.total,
    )


def logit_grad(products: Products, target: Tensor, upstream: UpstreamGradient) -> None:
    rows = _block_rows(products.tile)
    for start in range(0, products.tile.shape[0], rows):
        block = slice(start, start + rows)
        _logit_grad_block(products.of_rows(block), target[block], upstream.of_rows(block))


def _logit_grad_block(products: Products, target: Tensor, upstream: UpstreamGradient) -> None:
    tile, bias, map = products
    anchor, norm, logp, g, h, k, entropy = upstream
    targets = _targets(target, tile.shape[1])
    weight = -g if h is None else h - g
    own_p = logp.exp()
    own = -torch.expm1(logp) * g
    if h is not None:
        own = own + own_p * h
    # Where p is largest, next to nothing is rounded in t - lse, but in lse itself; rest is
    # exact, also of logits so large that log_norm is lost beside them.
    top, log_norm = anchor.double(), norm.double().log()
    anchor = (top + log_norm).to(anchor.dtype)
    rest = (anchor.double() - top) - log_norm
    scale = rest.exp() * map.rate(rest)
    if k is None or entropy is None:
        rows = _shifted(products, anchor).exp_()
        factor = (weight * scale).to(anchor.dtype)[:, None]
    else:
        # p log p is 0 where p is, also at a logit of -inf.
        own = own - torch.where(own_p == 0, 0.0, own_p * (logp + entropy)) * k
        # weight - k (log p + entropy), of log p = shifted + rest
        constant = (weight - k * (entropy + rest)) * scale
        rows, factor = _exp_and_linear(products, anchor, constant, -k * scale)
    own = own * map.rate(own)
    if map.cap != 0:
        at = None if bias is None else bias[targets.place[1]]
        own = own * map.slope(with_bias(Products(tile[targets.place][None], at, map)))[0]
    _write(products, rows, factor)
    targets.put(tile, own)


def _shifted(products: Products, anchor: Tensor) -> Tensor:
    """Logits less each row's anchor, a tensor of their own."""
    if _is_direct(products):
        return torch.addcmul(-anchor[:, None], products.tile, scale_of(products))
    return logits(products).sub_(anchor[:, None])


def _exp_and_linear(
    products: Products, anchor: Tensor, constant: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """exp(shifted), and constant + slope shifted: finite, since 0 times infinity is no 0."""
    tile, exact = products.tile, anchor.dtype
    if not _is_direct(products):
        shifted = _shifted(products, anchor).clamp_(min=_LOWEST)
        linear = torch.addcmul(constant.to(exact)[:, None], shifted, slope.to(exact)[:, None])
        return shifted.exp_(), linear
    # Both in one operator, so that the tile is read once.
    limit = min(torch.finfo(tile.dtype).max, -_LOWEST)
    tile.clamp_(-limit, limit)
    start = torch.stack([-anchor.double(), constant - slope * anchor.double()], 1)
    rate = torch.stack([torch.ones_like(slope), slope], 1)
    rate = rate * products.map.rate(rate)
    both = torch.addcmul(start.to(exact)[:, :, None], tile[:, None], rate.to(exact)[:, :, None])
    return both[:, 0].exp_(), both[:, 1]


def target_logits(hidden: Tensor, slab: Slab, target: Tensor) -> TargetLogits:
    weight, bias, map = slab
    here = (target >= 0) & (target < weight.shape[0])
    index = torch.where(here, target, 0)
    raw = _gather_dot(hidden, weight, index)
    if bias is not None:
        raw += bias[index]
    raw = torch.where(here, raw, torch.nan)
    return TargetLogits(torch.where(here, target, -1), raw, map.logit(raw))


def settle(
    sums: RowSums, own: TargetLogits, exps: Tensor | None, map: LogitMap
) -> tuple[RowScores, Tensor]:
    rows = row_scores(sums, own.logit)
    scale = exponential_scale(sums, rows)
    if exps is not None:
        write_target(exps, own, rows, scale, map)
    return rows, scale


def _gather_dot(hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """hidden[i] . weight[index[i]], (rows,) in the statistics' dtype."""
    dtype = statistics_dtype(hidden.dtype)
    rows = _block_rows(hidden)
    parts = [
        (part.to(dtype) * weight.index_select(0, at).to(dtype)).sum(-1)
        for part, at in zip(hidden.split(rows), index.split(rows), strict=True)
    ]
    return torch.cat(parts)


def gradient_factors(gradient: Tensor, scale: Tensor, rate: float) -> Tensor:
    # A row without upstream gradient gets none, whatever it holds.
    return torch.where(gradient == 0, 0.0, -rate * gradient * scale)


def scale_rows(rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    return out.copy_(rows * factor[:, None])
