# SPDX-License-Identifier: Apache-2.0
"""What exp_rows.py leaves open where a row was split into shares, or is to be kept in halves.

The sums of a row's shares, each about an anchor a_i of its own, become those about the largest, a:
with f_i = exp(a_i - a),

    S = sum of f_i S_i,   best = max best_i, its first column,
    weighted = sum of f_i (weighted_i + (best_i - best) S_i),   squares = sum of f_i^2 squares_i,
    total = sum of total_i

in the order of the shares. Exponentials about another anchor than a are scaled to it.

A half ends at exp(11): with HALVES the tile still holds products, and receives probabilities as far
as this tile knows them,

    offset = log(S + exp(target logit - a)),   the last term only where the target is here
    tile[n, v] = exp(t - a - offset),   0 at the target

and with neither term there is nothing to scale: the offset is 0. Bytes: none of an ordinary row;
2 read and 2 written a logit for halves, and 2 and 2 (float32: 4 and 4) for a share that is scaled.
"""

import triton
import triton.language as tl

from .exp_rows import load_step, row_start, share_bounds, step_columns, store_step
from .exponentials import INF, anchored
from .logit_map import map_of_row
from .statistics import BEST, WEIGHTED, fold_terms, load_terms, move_terms, store_terms

MOST_SHARES = 64


@triton.jit
def add_shares(
    sums,  # of this row, (kinds, shares)
    best_index,
    out,  # (kinds,)
    out_index,
    kind,  # from one kind of sums to the next
    sums_stride,
    out_stride,
    shares,
    write,
    STATISTICS: tl.constexpr,
    CAPPED: tl.constexpr,
    MOST_SHARES: tl.constexpr,
):
    """The anchor and S; with ``write`` everything is written to ``out``."""
    share = tl.arange(0, MOST_SHARES)
    there = share < shares
    own = sums + share * sums_stride
    anchors = tl.load(own, there, -INF)
    a = tl.max(anchors, 0)
    # Equal ones may be infinite.
    factors = tl.where(anchors == a, 1.0, tl.exp(anchors - a))
    parts = tl.load(own + kind, there, 0.0)
    total = tl.sum(tl.where(there, parts * factors, 0.0), 0)
    if STATISTICS:
        first, first_out = own + 3 * kind, out + 3 * out_stride
        tops = tl.load(first + BEST * kind, there, -INF)
        best = tl.max(tops, 0)
        found = tl.load(best_index + share * sums_stride, there & (tops == best), 1 << 40)
        below = tl.where(parts > 0, (tops - best) * parts, 0.0)
        weighted = (tl.load(first + WEIGHTED * kind, there, 0.0) + below) * factors
        weighted = tl.sum(tl.where(there, weighted, 0.0), 0)
        tl.store(first_out + BEST * out_stride, best, write)
        tl.store(first_out + WEIGHTED * out_stride, weighted, write)
        terms = move_terms(load_terms(first, kind, there, CAPPED), tl.where(there, factors, 0.0))
        store_terms(first_out, out_stride, 0, fold_terms(terms), write, CAPPED)
        tl.store(out_index, tl.min(found, 0), write)
    tl.store(out, a, write)
    tl.store(out + out_stride, total, write)
    return a, total


@triton.jit(do_not_specialize=["columns", "tile_stride", "shares", "sums_stride", "out_stride"])
def join_shares_kernel(
    tile,  # (N, V)
    tile_stride,
    target,  # (N,) int64, a column of the tile or elsewhere
    target_logit,  # (N,) float32
    bias,  # (V,) float32, or None
    sums,  # (kinds, shares, N) float32
    best_index,  # (shares, N) int64, or None
    out,  # (kinds, N) float32
    out_index,  # (N,) int64, or None
    columns,  # V
    shares,
    sums_stride,  # from one share's row of sums to the next
    out_stride,
    scale,  # a number or with BY_ROW (N,) float32, and so the next two
    inner,
    cap,
    WRITE: tl.constexpr,
    HALVES: tl.constexpr,
    STATISTICS: tl.constexpr,
    CAPPED: tl.constexpr,
    BY_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    MOST_SHARES: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    id = tl.program_id(0) // shares
    share = tl.program_id(0) % shares
    kind = tl.cast(shares, tl.int64) * sums_stride
    own_index = out_index
    if STATISTICS:
        best_index += id
        own_index += id
    a, total = add_shares(
        sums + id,
        best_index,
        out + id,
        own_index,
        kind,
        sums_stride,
        out_stride,
        shares,
        share == 0,
        STATISTICS,
        CAPPED,
        MOST_SHARES,
    )
    offset = 0.0
    if WRITE:
        begin, _filled, end = share_bounds(columns, shares, share, PIECES * VECTOR)
        row = row_start(tile, tile_stride, id, ALIGNED, VECTOR)
        if HALVES:
            y = tl.load(target + id)
            here = (y >= 0) & (y < columns)
            norm = total + tl.where(here, tl.exp(tl.load(target_logit + id) - a), 0.0)
            offset = tl.where(norm == 0, 0.0, tl.log(norm))
            lse = a + offset
            y = tl.where(here, y, -1).to(tl.int32)
            scale, inner, cap = map_of_row(scale, inner, cap, id, BY_ROW)
            for first in range(begin, end, PIECES * VECTOR):
                cols, reached = step_columns(first, end, PIECES, VECTOR, WHOLE)
                _raw, z = load_step(row, bias, cols, reached, end, True)
                other = (cols < end) & (cols != y)
                _x, e, _t, slope = anchored(z, other, lse, scale, inner, cap, CAPPED, False)
                e = e * slope if CAPPED else e
                store_step(row, cols, reached, e.to(tl.float16), True)
        else:
            mine = tl.load(sums + share * sums_stride + id)
            factor = tl.exp(mine - a)
            if mine < a:
                for first in range(begin, end, PIECES * VECTOR):
                    cols, reached = step_columns(first, end, PIECES, VECTOR, WHOLE)
                    e = tl.load(row + cols, reached, 0.0).to(tl.float32) * factor
                    store_step(row, cols, reached, e.to(row.dtype.element_ty), True)
    tl.store(out + 2 * out_stride + id, offset, share == 0)
