# SPDX-License-Identifier: Apache-2.0
"""Rows of raw products, formed again in backward, turned in place into the gradient with respect to
themselves: the formula is that of linear_grad.py.

A row is split into shares of consecutive columns, a program each. Bytes: read 2, written 2
(float32: 4 and 4) a logit.
"""

import triton
import triton.language as tl

from .exp_rows import (
    LOWEST,
    load_step,
    row_start,
    share_bounds,
    step_columns,
    store_step,
)
from .exponentials import anchored
from .linear_grad import one_minus_exp
from .logit_map import LN2, map_of_row


@triton.jit
def grad_step(
    row,
    bias,
    first,
    end,
    y,
    anchor,
    rate,  # (h - g) / norm
    entropy_rate,  # -k / norm
    entropy_less_log_norm,
    own,  # the gradient at the target's logit
    scale,
    inner,
    cap,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
):
    cols, reached = step_columns(first, end, PIECES, VECTOR, WHOLE)
    _, z = load_step(row, bias, cols, reached, end, MASKED)
    # What padding receives is never read.
    all = tl.full((PIECES, VECTOR), True, dtype=tl.int1)
    x, e, _, slope = anchored(z, all, anchor, scale, inner, cap, CAPPED, EXACT)
    value = e * rate
    if ENTROPY:
        # p log p is 0 where p is, also at a logit of -inf.
        log_p = tl.maximum(x, LOWEST) * (1.0 if EXACT else LN2) + entropy_less_log_norm
        value += e * entropy_rate * log_p
    value = tl.where(cols == y, own, value) * scale
    if CAPPED:
        value *= slope
    store_step(row, cols, reached, value.to(row.dtype.element_ty), MASKED)


@triton.jit(do_not_specialize=["columns", "tile_stride", "shares"])
def logit_grad_rows_kernel(
    tile,  # (N, V)
    tile_stride,
    target,  # (N,) int64, a column of the tile or elsewhere
    anchor,  # (N,) float32, and so the others
    norm,
    logp,
    grad_logp,
    grad_lse,  # or None
    grad_entropy,  # or None
    entropy,  # or None
    bias,  # (V,) float32, or None
    columns,  # V
    shares,
    scale,  # a number or with BY_ROW (N,) float32, and so the next two
    inner,
    cap,
    CAPPED: tl.constexpr,
    BY_ROW: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    id = tl.program_id(0) // shares
    share = tl.program_id(0) % shares
    begin, filled, end = share_bounds(columns, shares, share, PIECES * VECTOR)
    row = row_start(tile, tile_stride, id, ALIGNED, VECTOR)
    scale, inner, cap = map_of_row(scale, inner, cap, id, BY_ROW)
    y = tl.load(target + id)
    y = tl.where((y >= begin) & (y < end), y, -1).to(tl.int32)
    a = tl.load(anchor + id)
    n = tl.load(norm + id)
    own_log_p = tl.load(logp + id)
    g = tl.load(grad_logp + id)
    own = g * one_minus_exp(own_log_p)
    rate = -g
    if grad_lse is not None:
        h = tl.load(grad_lse + id)
        own += tl.exp(own_log_p) * h
        rate += h
    entropy_rate = 0.0
    entropy_less_log_norm = 0.0
    if grad_entropy is not None:
        k = tl.load(grad_entropy + id)
        of_row_entropy = tl.load(entropy + id)
        own_p = tl.exp(own_log_p)
        own -= tl.where(own_p > 0, k * own_p * (own_log_p + of_row_entropy), 0.0)
        entropy_rate = -k / n
        entropy_less_log_norm = of_row_entropy - tl.log(n)
    rate /= n
    for first in range(begin, filled, PIECES * VECTOR):
        grad_step(
            row, bias, first, end, y, a, rate, entropy_rate, entropy_less_log_norm, own, scale,
            inner, cap, grad_entropy is not None, CAPPED, EXACT, PIECES, VECTOR, WHOLE, False,
        )  # fmt: skip
    # At most once: as a branch the compiler spills for sm_90.
    for first in range(filled, end, PIECES * VECTOR):
        grad_step(
            row, bias, first, end, y, a, rate, entropy_rate, entropy_less_log_norm, own, scale,
            inner, cap, grad_entropy is not None, CAPPED, EXACT, PIECES, VECTOR, WHOLE, True,
        )  # fmt: skip
