# SPDX-License-Identifier: Apache-2.0
"""Divergences of two rows of raw products, with their gradients in closed form, in plain torch.

With logits s of the student and t of the teacher, q = softmax(s), p = softmax(t):

    forward_kl     D = sum p log(p / q)
                   dD/ds = q - p
    reverse_kl     D = sum q log(q / p)
                   dD/ds = q (log(q / p) - D)
    jsd            D = beta sum p log(p / m) + (1 - beta) sum q log(q / m), m = (1-beta) q + beta p
                   dD/ds = (1 - beta) q (log(q / m) - sum q log(q / m))
    tv             D = sum |p - q| / 2
                   dD/ds = q (h - sum q h), h = sign(q - p) / 2
    bhattacharyya  D = -log b, b = sum sqrt(p q)
                   dD/ds = (q - sqrt(p q) / b) / 2
    cosine         D = 1 - c, c = s . t / (|s| |t|)
                   dD/ds = c s / |s|^2 - t / (|s| |t|)

A column without weight counts nothing: 0 log 0 is 0. Of the cosine, which has no weights, columns
that both biases exclude with -inf take no part.

These sums cancel where q is close to p, and the gradients where q is all but 1 somewhere. The
kernels sum other terms (csrc/cpu/divergence_rows.inl); here they are in float64, unless the
products were rounded to 16 bits before.

Bytes for each pair of 16-bit logits without bias and cap, counted as in torch.py, of
the value and with the gradient: forward_kl 64 and 90, reverse_kl 64 and 98, jsd 128 and 146, tv 44
and 86, bhattacharyya 64 and 90, cosine 37 and 63. The products are read and widened (12) and
normalised (16); what comes after is one operator for each difference, product and sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..slab import Products
from ..types import statistics_dtype
from ..vocab_parallel import THIS_RANK, Columns
from .torch import logits, scale_of, with_bias

# Elements of one temporary. Launches are what costs on a GPU.
_BLOCK_CPU = 1 << 20
_BLOCK_ELSEWHERE = 1 << 24
TEMPORARIES = 7  # of a block, alive at once

_PIECE = 64
_LARGE = 1e30  # beyond every logarithm


def block_elements(device_type: str) -> int:
    return _BLOCK_CPU if device_type == "cpu" else _BLOCK_ELSEWHERE


def formula_rows(
    student: Products,
    teacher: Products,
    divergence: str,
    beta: float,
    write: bool,
    columns: Columns = THIS_RANK,
) -> Tensor:
    """(rows,) in the statistics' dtype; with ``write`` the student's tile becomes dD / d(raw
    product)."""
    dtype = student.tile.dtype
    formula, wide = FORMULAS[divergence], formula_dtype(dtype)
    values = [student.tile.new_empty(0, dtype=statistics_dtype(dtype))]
    excluded = _excluded(student, teacher) if divergence == "cosine" else None
    for rows, own, other in logit_blocks(student, teacher, columns, wide):
        if excluded is not None:
            own.masked_fill_(excluded, 0)
            other.masked_fill_(excluded, 0)
        found = formula(own, other, columns, beta, write)
        if found.gradient is not None:
            _write(student.of_rows(rows), found.gradient, found.factor)
        values.append(found.value.to(values[0].dtype))
    return torch.cat(values)


def logit_blocks(
    student: Products,
    teacher: Products,
    columns: Columns,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of two tiles of raw products, and their logits in ``dtype`` (None: the statistics'), a
    few at a time."""
    total, cols = student.tile.shape
    # Each block has its collectives, and ranks hold different numbers of columns.
    step = max(1, block_elements(student.tile.device.type) // max(1, cols))
    if columns.group is not None:
        step = max(1, total)
    for start in range(0, total, step):
        rows = slice(start, min(total, start + step))
        yield rows, logits(student.of_rows(rows), dtype), logits(teacher.of_rows(rows), dtype)


def _excluded(student: Products, teacher: Products) -> Tensor | None:
    """(cols,) columns that both biases exclude with -inf. Under a cap that is an ordinary logit."""
    if student.bias is None or teacher.bias is None or student.map.cap != 0:
        return None
    return (student.bias == -math.inf) & (teacher.bias == -math.inf)


def formula_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def _write(products: Products, gradient: Tensor, factor: float) -> None:
    """The gradient at raw products, into their tile; uses ``gradient`` up."""
    if products.map.cap != 0:
        gradient = gradient.mul_(products.map.slope(with_bias(products)))
    torch.mul(gradient, scale_of(products) * factor, out=products.tile)


class _Found(NamedTuple):
    value: Tensor  # (rows,)
    gradient: Tensor | None = None  # (rows, cols), but for ``factor``
    factor: float = 1.0


# Each takes logits s and t (rows, cols), what they are summed over, beta, and whether the gradient
# is wanted.


def _forward_kl(s: Tensor, t: Tensor, over: Columns, beta: float, write: bool) -> _Found:
    log_q, log_p = over.log_softmax(s), over.log_softmax(t)
    undefined = _undefined(log_q, log_p)
    p = log_p.exp()
    # Without weight, a column of infinite ratio is NaN and counts nothing.
    value = over.total(log_p.sub_(log_q).mul_(p).nansum(1)) + undefined
    return _Found(value, log_q.exp_().sub_(p) if write else None)


def _reverse_kl(s: Tensor, t: Tensor, over: Columns, beta: float, write: bool) -> _Found:
    log_q, log_p = over.log_softmax(s), over.log_softmax(t)
    undefined = _undefined(log_q, log_p)
    q = log_q.exp()
    terms = log_q.sub_(log_p).mul_(q)
    value = over.total(terms.nansum(1)) + undefined
    if not write:
        return _Found(value)
    terms.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return _Found(value, terms.addcmul_(q, -value[:, None]))


def _jsd(s: Tensor, t: Tensor, over: Columns, beta: float, write: bool) -> _Found:
    log_q, log_p = over.log_softmax(s), over.log_softmax(t)
    undefined = _undefined(log_q, log_p)
    p = log_p.exp()
    # log(p / q), finite: m / q with it is infinite where q is 0. From it both m / p and m / q, of
    # which no two are subtracted; m itself may underflow.
    ratio = log_p.sub_(log_q).nan_to_num_(nan=0.0, posinf=_LARGE, neginf=-_LARGE)
    q = log_q.exp_()
    own, other = math.log1p(-beta), math.log(beta)
    of_p = over.total(_log_add(own - ratio, other).mul_(p).sum(1))
    terms = _log_add(ratio.add_(other), own).mul_(q)
    of_q = over.total(terms.sum(1)) + undefined
    value = -beta * of_p - (1 - beta) * of_q
    if not write:
        return _Found(value)
    return _Found(value, terms.addcmul_(q, -of_q[:, None]), beta - 1)


def _tv(s: Tensor, t: Tensor, over: Columns, beta: float, write: bool) -> _Found:
    q = over.softmax(s)
    difference = q - over.softmax(t)
    value = over.total(_power_sum(difference, 1)) / 2
    if not write:
        return _Found(value)
    terms = difference.sign_().mul_(q)
    centre = over.total(terms.sum(1)) + 0 * value  # NaN where the value is
    return _Found(value, terms.addcmul_(q, -centre[:, None]), 0.5)


def _bhattacharyya(s: Tensor, t: Tensor, over: Columns, beta: float, write: bool) -> _Found:
    log_q, log_p = over.log_softmax(s), over.log_softmax(t)
    # Normalised anew, since its exponentials may underflow everywhere.
    middle = log_p.add_(log_q).mul_(0.5)
    if over.group is not None:
        return _bhattacharyya_of_ranks(log_q, middle, over, write)
    rows, column = torch.arange(s.shape[0], dtype=torch.int64, device=s.device), middle.argmax(1)
    top = middle[rows, column]
    # Of rows that share no column, q alone remains.
    middle.index_put_((rows, column), top.clamp(min=-_LARGE))
    shared = middle.softmax(1)
    # On CPU softmax adds one number after another; their sum is what its own lacks.
    value = (shared[rows, column].double() / shared.sum(1)).log() - top.double()
    if not write:
        return _Found(value)
    shared.index_put_((rows, column), shared[rows, column].masked_fill(top == -math.inf, 0))
    return _Found(value, log_q.exp_().sub_(shared), 0.5)


def _bhattacharyya_of_ranks(log_q: Tensor, middle: Tensor, over: Columns, write: bool) -> _Found:
    whole = over.logsumexp(middle)
    if not write:
        return _Found(-whole)
    # Of rows that share no column, q alone remains.
    shared = torch.where(whole[:, None] == -math.inf, 0.0, (middle - whole[:, None]).exp_())
    return _Found(-whole, log_q.exp_().sub_(shared), 0.5)


def _cosine(s: Tensor, t: Tensor, over: Columns, beta: float, write: bool) -> _Found:
    lengths = [over.total(_power_sum(one, 2).double()).sqrt() for one in (s, t)]
    # A row of zeros has no direction.
    inverse_s, inverse_t = (torch.where(one == 0, 0.0, 1 / one) for one in lengths)
    both = inverse_s * inverse_t
    cosine = over.total((s * t).sum(1)) * both
    value = 1 - cosine
    if not write:
        return _Found(value)
    factors = (cosine * inverse_s.square()).to(s.dtype), -both.to(s.dtype)
    return _Found(value, s.mul_(factors[0][:, None]).addcmul_(t, factors[1][:, None]))


def _power_sum(matrix: Tensor, order: int) -> Tensor:
    """(rows,) sums of |x|^order, order 1 or 2, in one pass. On CPU a norm adds one number after
    another, so that it is taken of pieces."""
    cols = matrix.shape[1]
    whole = cols - cols % _PIECE
    pieces = matrix[:, :whole].unflatten(1, (whole // _PIECE, _PIECE))
    norms = [
        torch.linalg.vector_norm(one, ord=order, dim=-1)
        for one in (pieces, matrix[:, None, whole:])
    ]
    return torch.cat(norms, dim=1).pow_(order).sum(1)


def _log_add(logs: Tensor, number: float) -> Tensor:
    """log(exp(logs) + exp(number)), in place."""
    other = torch.full((1, 1), number, dtype=logs.dtype, device=logs.device)
    return torch.logaddexp(logs, other, out=logs)


def _undefined(log_q: Tensor, log_p: Tensor) -> Tensor:
    """(rows,) NaN where one is no distribution, and so NaN in every column; else 0."""
    both = log_q[:, 0] + log_p[:, 0]
    return torch.where(both.isnan(), both, 0.0)


# In the order of the compiled operator's numbers.
FORMULAS: Mapping[str, Callable[[Tensor, Tensor, Columns, float, bool], _Found]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tv": _tv,
    "bhattacharyya": _bhattacharyya,
    "cosine": _cosine,
}
DIVERGENCES = tuple(FORMULAS)
