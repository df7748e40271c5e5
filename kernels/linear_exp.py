# SPDX-License-Identifier: Apache-2.0
"""Products of hidden states with a head, turned into exponentials before they leave the chip.

    z[n, v] = hidden[n] . weight[v] + bias[v],   t = the logit of z (logit_map.py)
    e[n, v] = exp(t[n, v] - anchor[n]),   0 at the row's target
    sums[0, v // BLOCK_COLS, n] = sum of e[n, v] over the columns of that tile

and, where there is a ``best_index``, over the same columns: from 1 on those of statistics.py, and
in it the first column of the largest t. ``exps``, where given, receives e (times the slope under a
cap) in its own dtype; halves receive the logarithm of that, packed for probabilities.py, which
takes the exponentials once the sums are known.

The anchor is known before the product, so tiles need nothing of each other: no running maximum, no
rescaling, no atomics, and partial sums that add up in a fixed order (row_sums.py). An anchor far
below the row's largest logit overflows; reanchor.py mends such rows.

One program works through many tiles, ``GROUP_ROWS`` row tiles at a time down each column tile, so
that their hidden states stay in the second-level cache while the weight streams by. With
``FLATTEN`` the loads of its next tile are under way during the epilogue of this one. Bytes: hidden
and weight are read about once a group, ``exps`` is written once; 2 N H V flop.
"""

import triton
import triton.language as tl

from .logit_map import logits_above
from .probabilities import pack_logarithms
from .products import describe_product, load_product, slice_columns, tile_position
from .statistics import (
    BEST,
    WEIGHTED,
    add_terms,
    mask_terms,
    no_terms,
    store_terms,
    sum_terms,
)

LOWEST = tl.constexpr(-1e38)


@triton.jit
def load_target(target, ids, mask, columns):
    """Targets as 32-bit columns, -1 for those that lie elsewhere."""
    y = tl.load(target + ids, mask, -1)
    return tl.where((y >= 0) & (y < columns), y, -1).to(tl.int32)


@triton.jit
def slice_largest(t, e, cols, columns, RAGGED: tl.constexpr):
    """Of some columns of each row: the largest logit, its first column, the sum of
    e (t - largest)."""
    shown = t
    if RAGGED:
        shown = tl.where((cols < columns)[None, :], t, -float("inf"))
    best = tl.max(shown, 1)
    # The lowest column of equals.
    first = tl.min(tl.where(shown == best[:, None], cols[None, :], columns), 1)
    # A logit of -inf has no weight: finite, it stays so times that. Where all are, NaN is left.
    weighted = tl.sum(e * (tl.maximum(t, LOWEST) - best[:, None]), 1)
    return best, first, weighted


@triton.jit
def finish_slice(
    z,  # (BLOCK_ROWS, SLICE_COLS) raw products
    col,  # first column
    own,  # (BLOCK_ROWS,) int32, targets
    a,  # (BLOCK_ROWS,) anchors
    ids,  # (BLOCK_ROWS,) row numbers
    mask,
    row,  # the first row, where rows follow each other
    exps,
    bias,
    columns,
    exps_stride,
    scale,
    inner,
    cap,
    SLICE_COLS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Writes the exponentials of some columns of a tile. Returns the logits, the exponentials,
    their sums, and which columns are there and no target."""
    cols = col + tl.arange(0, SLICE_COLS)
    if bias is not None:
        z += tl.load(bias + cols, cols < columns, 0.0)[None, :]
    t, slope, x, e = logits_above(z, a, scale, inner, cap, CAPPED, EXACT)
    other = cols[None, :] != own[:, None]
    if RAGGED:
        other = other & (cols < columns)[None, :]
    e = tl.where(other, e, 0.0)
    total = tl.sum(e, 1)
    if exps is not None:
        element: tl.constexpr = exps.dtype if DESCRIPTORS else exps.dtype.element_ty
        kept = e
        if element == tl.float16:
            if CAPPED:
                x += tl.log(slope)
            kept = pack_logarithms(tl.where(other, x, -float("inf")))
        elif CAPPED:
            kept = e * slope
        store_slice(
            exps,
            kept,
            ids,
            mask,
            row,
            cols,
            col,
            columns,
            exps_stride,
            DESCRIPTORS,
            RAGGED,
            ALIGNED,
        )
    return t, e, total, other


@triton.jit
def store_slice(
    matrix,
    values,
    ids,
    mask,
    row,
    cols,
    col,
    columns,
    stride,
    DESCRIPTORS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``RAGGED``: the last slice of a row may end beyond its last column. ``ALIGNED``: rows start
    at multiples of 16 bytes."""
    if DESCRIPTORS:
        matrix.store([row, col], values.to(matrix.dtype))
    else:
        if ALIGNED:
            piece: tl.constexpr = 128 // matrix.dtype.element_ty.primitive_bitwidth
            # Of this the compiler knows what it is a multiple of.
            stride = stride // piece * piece
        # 64-bit: N V passes 2^31.
        at = ids.to(tl.int64)[:, None] * stride + cols[None, :]
        inside = (mask & (col < columns))[:, None]
        if RAGGED:
            inside = inside & (cols < columns)[None, :]
        tl.store(matrix + at, values.to(matrix.dtype.element_ty), inside)


@triton.jit
def finish_tile(
    acc,
    ids,  # (BLOCK_ROWS,) row numbers
    mask,
    row,  # the first row, where rows follow each other
    col,
    exps,
    bias,
    target,
    anchor,
    sums,
    best_index,
    sums_stride,
    columns,
    exps_stride,
    scale,
    inner,
    cap,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Exponentials and sums of a tile of products."""
    own = load_target(target, ids, mask, columns)
    a = tl.load(anchor + ids, mask, 0.0)
    slice_cols: tl.constexpr = BLOCK_COLS // SLICES
    parts = slice_columns(acc, BLOCK_ROWS, BLOCK_COLS, SLICES)
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    best = tl.full((BLOCK_ROWS,), -float("inf"), dtype=tl.float32)
    index = tl.zeros((BLOCK_ROWS,), dtype=tl.int32) + col
    weighted = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    terms = no_terms((BLOCK_ROWS,))
    for i in tl.static_range(SLICES):
        first = col + i * slice_cols
        t, e, s, other = finish_slice(
            parts[i],
            first,
            own,
            a,
            ids,
            mask,
            row,
            exps,
            bias,
            columns,
            exps_stride,
            scale,
            inner,
            cap,
            slice_cols,
            DESCRIPTORS,
            RAGGED,
            ALIGNED,
            CAPPED,
            EXACT,
        )
        # A slice may begin beyond the last column: nothing of it counts, whatever it came to.
        here = first < columns
        s = tl.where(here, s, 0.0)
        if best_index is not None:
            cols = first + tl.arange(0, slice_cols)
            top, at, w = slice_largest(t, e, cols, columns, RAGGED)
            top = tl.where(here, top, -float("inf"))
            raised = tl.maximum(best, top)
            # Sums of 0 have no weight, and their largest may be -inf.
            moved = tl.where(total > 0, (best - raised) * total, 0.0)
            moved += tl.where(s > 0, (top - raised) * s, 0.0)
            weighted += moved + tl.where(s == 0, 0.0, w)
            index = tl.where(top > best, at, index)
            best = raised
            more = mask_terms(sum_terms(e, t, other, CAPPED), here)
            terms = add_terms(terms, more, CAPPED)
        total += s
    at = tl.cast(col // BLOCK_COLS, tl.int64) * sums_stride + ids
    tl.store(sums + at, total, mask)
    if best_index is not None:
        kind = tl.cast(tl.cdiv(columns, BLOCK_COLS), tl.int64) * sums_stride
        firsts = sums + kind
        tl.store(firsts + BEST * kind + at, best, mask)
        tl.store(firsts + WEIGHTED * kind + at, weighted, mask)
        store_terms(firsts, kind, at, terms, mask, CAPPED)
        tl.store(best_index + at, index, mask)


# Compiled once whatever the sizes: some follow the data.
@triton.jit(
    do_not_specialize=["rows", "columns", "width", "exps_stride", "hidden_stride", "weight_stride"],
    do_not_specialize_on_alignment=["bias", "target", "anchor"],
)
def linear_exp_kernel(
    hidden,  # (N, H) descriptor or pointer
    weight,  # (V, H) descriptor or pointer
    exps,  # (N, V) descriptor or pointer, or None
    exps_stride,
    bias,  # (V,) float32, or None
    target,  # (N,) int64, column of the target
    anchor,  # (N,) float32
    sums,  # (kinds, column tiles, N) float32, rows at multiples of sums_stride
    best_index,  # (column tiles, N) int32, as far apart, or None
    sums_stride,
    rows,  # N
    columns,  # V
    width,  # H
    hidden_stride,
    weight_stride,
    scale,
    inner,
    cap,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    FLATTEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Else a flattened loop has the epilogue twice.
    tl.assume(width > 0)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    col_tiles = tl.cdiv(columns, BLOCK_COLS)
    for tile in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN
    ):
        row_tile, col_tile = tile_position(tile, row_tiles, col_tiles, GROUP_ROWS)
        row = row_tile * BLOCK_ROWS
        col = col_tile * BLOCK_COLS
        ids = row + tl.arange(0, BLOCK_ROWS)
        mask = ids < rows
        if DESCRIPTORS:
            acc = describe_product(
                hidden, weight, row, col, width, BLOCK_ROWS, BLOCK_COLS, BLOCK_WIDTH, PRECISION
            )
        else:
            acc = load_product(
                hidden,
                weight,
                ids,
                mask,
                col + tl.arange(0, BLOCK_COLS),
                columns,
                width,
                hidden_stride,
                weight_stride,
                BLOCK_ROWS,
                BLOCK_COLS,
                BLOCK_WIDTH,
                PRECISION,
            )
        finish_tile(
            acc,
            ids,
            mask,
            row,
            col,
            exps,
            bias,
            target,
            anchor,
            sums,
            best_index,
            sums_stride,
            columns,
            exps_stride,
            scale,
            inner,
            cap,
            BLOCK_ROWS,
            BLOCK_COLS,
            SLICES,
            DESCRIPTORS,
            RAGGED,
            ALIGNED,
            CAPPED,
            EXACT,
        )
