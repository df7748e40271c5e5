# SPDX-License-Identifier: Apache-2.0
"""Exponentials of rows of raw products about an anchor, in place of the products, and their sums.

    t[n, v] = the logit of tile[n, v] + bias[v] (logit_map.py)
    e[n, v] = exp(t[n, v] - anchor[n]),   0 at the row's target
    sums: 0 the anchor, 1 the sum of e, 2 zero

and, with STATISTICS, from 3 on those of statistics.py, and in ``best_index`` the first column of
the largest t. With WRITE the tile becomes e (times the slope under a cap).

The tile is read once and written once, although only at the end of a row it is known whether the
anchor will do, and an exponential that overflowed could not be turned back: 16 bytes of columns
that follow each other are a piece, and from a logit on that lies more than ``GUARD`` above the
anchor the pieces of that place in each step keep their products, of which only the largest is
looked for. If there was one, the largest logit becomes the anchor and the row is gone over again:
pieces that hold exponentials are scaled to it, the others taken then.

A row is split into shares of consecutive columns, a program each; join_shares.py puts several
together. A share that moves its anchor moves alone. Bytes: read 2, written 2 (float32: 4 and 4) a
logit; a share that moves its anchor twice that.
"""

import triton
import triton.language as tl

from .exponentials import INF, anchored
from .logit_map import LN2, LOG2E, map_logits, map_of_row
from .statistics import (
    BEST,
    WEIGHTED,
    add_terms,
    fold_terms,
    mask_terms,
    move_terms,
    no_terms,
    store_terms,
    sum_terms,
    take_terms,
)

WARPS = 4
# Of one step: two a thread, one under a cap, where the compiler spills for sm_90 with two.
PIECES = WARPS * 32 * 2
CAPPED_PIECES = WARPS * 32
# Of a thread where there is a bias: by itself the compiler takes fewer, and spills some.
BIAS_REGISTERS = 128
# exp(30) an element leaves exp(72) for a sum of squares over 2^18 columns: float32 ends at exp(88).
GUARD = tl.constexpr(30.0)
# A row of nothing but -inf takes a finite anchor below every other part's.
LOWEST_ANCHOR = tl.constexpr(-1e30)
# Its exponential is 0, and so is its product with that: of -inf it would be NaN.
LOWEST = tl.constexpr(-1e4)


@triton.jit
def share_bounds(columns, shares, share, BLOCK: tl.constexpr):
    """Of a share: its first column, that of a last step which it does not fill, and its end."""
    steps = tl.cdiv(tl.cdiv(columns, BLOCK), shares)
    # Nothing that is rounded to a column: accesses are wide where they begin at whole steps.
    begin = share * steps * BLOCK
    end = tl.minimum(begin + steps * BLOCK, columns)
    return begin, begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK, end


@triton.jit
def row_start(tile, stride, row, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    # 64-bit: N V passes 2^31.
    start = row.to(tl.int64) * stride
    if ALIGNED:
        start = tl.multiple_of(start, VECTOR)
    return tile + start


@triton.jit
def step_columns(first, end, PIECES: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr):
    """Columns of a step, (PIECES, VECTOR), and which of them are read and written: with WHOLE whole
    pieces, the last one with the padding behind the row. A predicate an element spills."""
    starts = first + tl.arange(0, PIECES)[:, None] * VECTOR
    cols = starts + tl.arange(0, VECTOR)[None, :]
    return cols, tl.broadcast_to(starts < end, (PIECES, VECTOR)) if WHOLE else cols < end


@triton.jit
def load_step(row, bias, cols, reached, end, MASKED: tl.constexpr):
    """Raw products as they are stored, and the same with the bias; anything beyond the end."""
    if MASKED:
        raw = tl.load(row + cols, reached, 0.0)
    else:
        raw = tl.load(row + cols)
    z = raw.to(tl.float32)
    if bias is not None:
        # Instead of a mask: the bias has no padding.
        z += tl.load(bias + (tl.minimum(cols, end - 1) if MASKED else cols))
    return raw, z


@triton.jit
def store_step(row, cols, reached, values, MASKED: tl.constexpr):
    if MASKED:
        tl.store(row + cols, values, reached)
    else:
        tl.store(row + cols, values)


@triton.jit
def take_step(
    row,
    bias,
    first,
    end,
    y,
    a,
    highest,  # (PIECES,) of what was seen: the largest x
    total,  # of what was taken: the sum of e
    taken,  # how many steps were taken
    best,  # the first column of the largest x
    centre,  # what x of `weighted` is about
    weighted,
    terms,
    scale,
    inner,
    cap,
    WRITE: tl.constexpr,
    STATISTICS: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
):
    cols, reached = step_columns(first, end, PIECES, VECTOR, WHOLE)
    raw, z = load_step(row, bias, cols, reached, end, MASKED)
    other = cols != y
    if MASKED:
        other = other & (cols < end)
    x, e, t, slope = anchored(z, other, a, scale, inner, cap, CAPPED, EXACT)
    top = tl.max(x, 1)
    before = highest
    highest = tl.maximum(before, top)
    # So that a NaN is taken, and spoils the sum.
    going = (highest > (GUARD if EXACT else GUARD * LOG2E)) == 0
    taken += going.to(tl.int32)
    if STATISTICS:
        found = tl.min(tl.where(x == top[:, None], cols, end), 1)
        best = tl.where(top > before, found, best)
        # Without weight so far the centre may be -inf.
        raised = tl.where(total > 0, (centre - highest) * total, 0.0)
        # Neither is the difference of two -inf.
        apart = tl.maximum(x - tl.maximum(highest, LOWEST_ANCHOR)[:, None], LOWEST)
        weighted = tl.where(going, weighted + raised + tl.sum(e * apart, 1), weighted)
        centre = tl.where(going, highest, centre)
        more = add_terms(terms, sum_terms(e, t, other, CAPPED), CAPPED)
        terms = take_terms(going, more, terms)
    total = tl.where(going, total + tl.sum(e, 1), total)
    if WRITE:
        values = (e * slope if CAPPED else e).to(row.dtype.element_ty)
        store_step(row, cols, reached, tl.where(going[:, None], values, raw), MASKED)
    return highest, total, taken, best, centre, weighted, terms


@triton.jit
def highest_logit(
    row,
    bias,
    begin,
    end,
    y,
    scale,
    inner,
    cap,
    CAPPED: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Of all columns but the target's."""
    top = tl.full((PIECES, VECTOR), -INF, dtype=tl.float32)
    for first in range(begin, end, PIECES * VECTOR):
        cols, reached = step_columns(first, end, PIECES, VECTOR, WHOLE)
        _, z = load_step(row, bias, cols, reached, end, True)
        t, _ = map_logits(z, scale, inner, cap, CAPPED)
        top = tl.maximum(top, tl.where((cols < end) & (cols != y), t, -INF))
    return tl.max(tl.max(top, 1), 0)


@triton.jit
def take_rest(
    row,
    bias,
    begin,
    end,
    y,
    a,
    factor,  # of exponentials about the anchor before
    total,
    taken,
    weighted,
    terms,
    scale,
    inner,
    cap,
    WRITE: tl.constexpr,
    STATISTICS: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Goes over the row again: scales what was taken, takes the rest about the anchor ``a``."""
    number = 0
    for first in range(begin, end, PIECES * VECTOR):
        cols, reached = step_columns(first, end, PIECES, VECTOR, WHOLE)
        raw, z = load_step(row, bias, cols, reached, end, True)
        other = (cols < end) & (cols != y)
        x, e, t, slope = anchored(z, other, a, scale, inner, cap, CAPPED, EXACT)
        rest = taken <= number
        total += tl.where(rest, tl.sum(e, 1), 0.0)
        if STATISTICS:
            weighted += tl.where(rest, tl.sum(e * tl.maximum(x, LOWEST), 1), 0.0)
            # What does not move with the anchor was taken everywhere.
            terms = add_terms(terms, mask_terms(sum_terms(e, t, other, False), rest), False)
        if WRITE:
            values = e * slope if CAPPED else e
            values = tl.where(rest[:, None], values, raw.to(tl.float32) * factor)
            store_step(row, cols, reached, values.to(row.dtype.element_ty), True)
        number += 1
    return total, weighted, terms


@triton.jit(do_not_specialize=["columns", "tile_stride", "shares", "sums_stride"])
def exp_rows_kernel(
    tile,  # (N, V) raw products, exponentials with WRITE
    tile_stride,
    target,  # (N,) int64, a column of the tile or elsewhere
    anchor,  # (N,) float32
    bias,  # (V,) float32, or None
    sums,  # (kinds, shares, N) float32
    best_index,  # (shares, N) int64, or None
    columns,  # V
    shares,
    sums_stride,  # from one share's row of sums to the next
    scale,  # a number or with BY_ROW (N,) float32, and so the next two
    inner,
    cap,
    WRITE: tl.constexpr,
    STATISTICS: tl.constexpr,
    CAPPED: tl.constexpr,
    BY_ROW: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows start at multiples of 16 bytes
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,  # and are followed by padding to such
):
    id = tl.program_id(0) // shares
    share = tl.program_id(0) % shares
    begin, filled, end = share_bounds(columns, shares, share, PIECES * VECTOR)
    row = row_start(tile, tile_stride, id, ALIGNED, VECTOR)
    scale, inner, cap = map_of_row(scale, inner, cap, id, BY_ROW)
    # 32 bits of it, once it is known to lie in this share.
    y = tl.load(target + id)
    here = (y >= begin) & (y < end)
    y = tl.where(here, y, -1).to(tl.int32)
    a = tl.load(anchor + id)
    if (tl.abs(a) < INF) == 0:
        a = highest_logit(
            row, bias, begin, end, y, scale, inner, cap, CAPPED, PIECES, VECTOR, WHOLE
        )
        a = tl.where(a == -INF, LOWEST_ANCHOR, a)
    if STATISTICS:
        # Before it is overwritten.
        own = tl.load(row + y, here, 0.0).to(tl.float32)
        if bias is not None:
            own += tl.load(bias + y, here, 0.0)
        own, _, _, _ = anchored(own, here, a, scale, inner, cap, CAPPED, EXACT)
        if WRITE:
            # All threads load it, and one of them overwrites it.
            tl.debug_barrier()
    zeros = tl.zeros((PIECES,), dtype=tl.float32)
    total, weighted, terms = zeros, zeros, no_terms((PIECES,))
    highest = zeros - INF
    centre = highest
    taken = tl.zeros((PIECES,), dtype=tl.int32)
    best = taken + begin
    for first in range(begin, filled, PIECES * VECTOR):
        highest, total, taken, best, centre, weighted, terms = take_step(
            row, bias, first, end, y, a, highest, total, taken, best, centre, weighted, terms,
            scale, inner, cap, WRITE, STATISTICS, CAPPED, EXACT, PIECES, VECTOR, WHOLE,
            False,
        )  # fmt: skip
    # At most once: as a branch the compiler spills for sm_90.
    for first in range(filled, end, PIECES * VECTOR):
        highest, total, taken, best, centre, weighted, terms = take_step(
            row, bias, first, end, y, a, highest, total, taken, best, centre, weighted, terms,
            scale, inner, cap, WRITE, STATISTICS, CAPPED, EXACT, PIECES, VECTOR, WHOLE,
            True,
        )  # fmt: skip
    unit = 1.0 if EXACT else LN2
    top = tl.max(highest, 0)
    kept = a
    if top > (GUARD if EXACT else GUARD * LOG2E):
        a += top * unit
        factor = tl.exp(kept - a)
        if STATISTICS:
            # Nothing was taken where the centre is -inf.
            moved = tl.where(total > 0, (centre - top) * total, 0.0)
            weighted = (weighted + moved) * factor
            terms = move_terms(terms, factor)
        total *= factor
        # What was written above is read by other threads.
        tl.debug_barrier()
        total, weighted, terms = take_rest(
            row, bias, begin, end, y, a, factor, total, taken, weighted, terms, scale, inner, cap,
            WRITE, STATISTICS, CAPPED, EXACT, PIECES, VECTOR, WHOLE,
        )  # fmt: skip
        if STATISTICS:
            centre = zeros + top
    out = sums + share * sums_stride + id
    kind = tl.cast(shares, tl.int64) * sums_stride
    tl.store(out, a)
    tl.store(out + kind, tl.sum(total, 0))
    tl.store(out + 2 * kind, 0.0)
    if STATISTICS:
        largest = tl.maximum(top, own)
        first = tl.min(tl.where(highest == top, best, columns), 0)
        first = tl.where(own > top, y, tl.where(own == top, tl.minimum(first, y), first))
        below = tl.where(total > 0, (centre - largest) * total, 0.0)
        out += 3 * kind
        tl.store(out + BEST * kind, kept + largest * unit)
        tl.store(out + WEIGHTED * kind, tl.sum(weighted + below, 0) * unit)
        store_terms(out, kind, 0, fold_terms(terms), True, CAPPED)
        tl.store(best_index + share * sums_stride + id, first.to(tl.int64))
