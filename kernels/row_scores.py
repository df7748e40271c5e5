# SPDX-License-Identifier: Apache-2.0
"""What follows from the sums of each row and its target's logit t_y, with a the anchor:

    norm = S + exp(t_y - a),   log_norm = log norm,   logp = t_y - a - log_norm
    scale = exp(a + offset - anchor) / norm

``anchor`` is a, and with statistics the largest logit, to which norm and log_norm then move. Where
exponentials are kept, their target's column receives (p_y - 1) / scale, times the map's slope.
fastpref/scoring/backends/torch.py computes the same in a dozen launches.
"""

import triton
import triton.language as tl

from .logit_map import map_logits

ROWS = 128  # of one program's block


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0 in float64, without losing a small x (Kahan)."""
    one_more = 1.0 + x
    lost = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    # An infinite x has nothing to correct.
    exact = (one_more == 1.0) | (one_more == float("inf"))
    return tl.where(exact, tl.where(one_more == 1.0, x, one_more), tl.log(one_more) * (x / lost))


@triton.jit
def expm1(x):
    """exp(x) - 1 of x <= 0 in float64, without losing a small x (Kahan)."""
    e = tl.exp(x)
    safe = tl.where((e == 1.0) | (e == 0.0), 0.5, e)
    return tl.where(e == 1.0, x, tl.where(e == 0.0, -1.0, (e - 1.0) * (x / tl.log(safe))))


# Vectors may be parts of larger tensors: of any alignment.
@triton.jit(
    do_not_specialize=["rows", "exps_stride"],
    do_not_specialize_on_alignment=[
        *("sum", "anchor", "offset", "best", "column", "raw", "logit"),
    ],
)
def row_scores_kernel(
    sum,  # (N,), S
    anchor,  # (N,)
    offset,  # (N,), or None: 0
    best,  # (N,), or None
    column,  # (N,) int64, -1: the target is elsewhere
    raw,  # (N,)
    logit,  # (N,)
    exps,  # (N, V), or None
    scores,  # (5, N): logp, anchor, norm, log_norm, scale
    rows,
    scores_stride,
    exps_stride,
    scale,
    inner,
    cap,
    BLOCK_ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = ids < rows
    a = tl.load(anchor + ids, mask, 0.0).to(tl.float64)
    total = tl.load(sum + ids, mask, 1.0).to(tl.float64)
    relative = tl.load(logit + ids, mask, 0.0).to(tl.float64) - a
    norm = total + tl.exp(relative)
    log_norm = tl.where(relative == 0.0, log1p(total), tl.log(norm))
    logp = relative - log_norm
    top = a
    if best is not None:
        top = tl.load(best + ids, mask, 0.0).to(tl.float64)
        log_norm += a - top
        norm = tl.exp(log_norm)
    moved = a
    if offset is not None:
        moved += tl.load(offset + ids, mask, 0.0).to(tl.float64)
    factor = tl.exp(moved - top) / norm
    tl.store(scores + ids, logp.to(tl.float32), mask)
    tl.store(scores + scores_stride + ids, top.to(tl.float32), mask)
    tl.store(scores + 2 * scores_stride + ids, norm.to(tl.float32), mask)
    tl.store(scores + 3 * scores_stride + ids, log_norm.to(tl.float32), mask)
    tl.store(scores + 4 * scores_stride + ids, factor.to(tl.float32), mask)
    if exps is not None:
        y = tl.load(column + ids, mask, -1)
        value = expm1(logp) / factor
        if CAPPED:
            _, slope = map_logits(tl.load(raw + ids, mask, 0.0), scale, inner, cap, CAPPED)
            value *= slope
        at = exps + ids * exps_stride + tl.where(y < 0, 0, y)
        # Through float32: there is no direct way from float64 to bfloat16.
        tl.store(at, value.to(tl.float32).to(exps.dtype.element_ty), mask & (y >= 0))
