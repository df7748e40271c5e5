# SPDX-License-Identifier: Apache-2.0
"""Products of hidden states with a head, turned into exponentials before they leave the chip.

    z[n, v] = hidden[n] . weight[v] + bias[v],   t = the logit of z (logit_map.py)
    e[n, v] = exp(t[n, v] - anchor[n]),   0 at the row's target
    sums[0, v // SLICE_COLS, n] = sum of e[n, v] over the columns of that slice of a tile

and, with STATISTICS, over the same columns: 1 the largest t (the target's included), 2 the sum of
e (t - that), 3 the sum of e^2, 4 the sum of t (the target's left out), and in ``best_index`` the
first column of the largest. ``exps``, where given, receives e (times the slope under a cap) in its
own dtype; halves receive the logarithm of that, packed for probabilities.py, which takes the
exponentials once the sums are known.

The anchor is known before the product, so tiles need nothing of each other: no running maximum, no
rescaling, no atomics, and partial sums that add up in a fixed order (row_sums.py). An anchor far
below the row's largest logit overflows; reanchor.py mends such rows.

One program works through many tiles, ``GROUP_ROWS`` row tiles at a time down each column tile, so
that their hidden states stay in the second-level cache while the weight streams by. Bytes: hidden
and weight are read about once a group, ``exps`` is written once; 2 N H V flop.
"""

import triton
import triton.language as tl

from .logit_map import exp_difference, map_logits
from .probabilities import pack_logarithms

KINDS = 5  # of sums, with statistics


@triton.jit
def load_product(
    hidden,  # (N, H) pointer
    weight,  # (V, H) pointer
    rows,  # (BLOCK_ROWS,) int64, row numbers
    row_mask,
    cols,  # (BLOCK_COLS,) column numbers
    columns,  # V
    width,  # H
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden[rows] @ weight[cols].T in float32, loaded through pointers."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    inner = tl.arange(0, BLOCK_WIDTH)
    # 64-bit: N H and V H both pass 2^31.
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    weight_rows = weight + cols.to(tl.int64)[:, None] * weight_stride
    for start in range(0, width, BLOCK_WIDTH):
        k = (start + inner).to(tl.int64)[None, :]
        inside = k < width
        a = tl.load(hidden_rows + k * hidden_step, row_mask[:, None] & inside, 0.0)
        b = tl.load(weight_rows + k * weight_step, (cols < columns)[:, None] & inside, 0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def describe_product(
    hidden,  # (N, H) descriptor, blocks (BLOCK_ROWS, BLOCK_WIDTH)
    weight,  # (V, H) descriptor, blocks (BLOCK_COLS, BLOCK_WIDTH)
    row,  # first row
    col,  # first column
    width,  # H
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same through tensor descriptors: rows and columns beyond the end count as 0."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        a = hidden.load([row, start])
        b = weight.load([col, start])
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_target(target, ids, mask, columns):
    """Targets as 32-bit columns, -1 for those that lie elsewhere."""
    y = tl.load(target + ids, mask, -1)
    return tl.where((y >= 0) & (y < columns), y, -1).to(tl.int32)


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
    sums,
    best_index,
    rows,
    columns,
    exps_stride,
    scale,
    inner,
    cap,
    SLICE_COLS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Exponentials and sums of some columns of a tile."""
    cols = col + tl.arange(0, SLICE_COLS)
    inside = (cols < columns)[None, :]
    if bias is not None:
        z += tl.load(bias + cols, cols < columns, 0.0)[None, :]
    t, slope = map_logits(z, scale, inner, cap, CAPPED)
    other = inside & (cols[None, :] != own[:, None])
    e = tl.where(other, exp_difference(t, a[:, None], EXACT), 0.0)
    at = tl.cast(col // SLICE_COLS, tl.int64) * rows + ids
    # A slice may begin beyond the last column.
    stored = mask & (col < columns)
    tl.store(sums + at, tl.sum(e, 1), stored)
    if best_index is not None:
        kind = tl.cast(tl.cdiv(columns, SLICE_COLS), tl.int64) * rows
        shown = tl.where(inside, t, -float("inf"))
        best = tl.max(shown, 1)
        # The lowest column of equals.
        first = tl.min(tl.where(shown == best[:, None], cols[None, :], columns), 1)
        # A logit of -inf has no weight.
        weighted = tl.sum(tl.where(e > 0, e * (t - best[:, None]), 0.0), 1)
        tl.store(sums + kind + at, best, stored)
        tl.store(sums + 2 * kind + at, weighted, stored)
        tl.store(sums + 3 * kind + at, tl.sum(e * e, 1), stored)
        tl.store(sums + 4 * kind + at, tl.sum(tl.where(other, t, 0.0), 1), stored)
        tl.store(best_index + at, first, stored)
    if exps is not None:
        element: tl.constexpr = exps.dtype if DESCRIPTORS else exps.dtype.element_ty
        if element == tl.float16:
            x = t - a[:, None]
            if CAPPED:
                x += tl.log(slope)
            e = pack_logarithms(tl.where(other, x, -float("inf")))
        elif CAPPED:
            e *= slope
        store_tile(exps, e, ids, mask, row, cols, col, columns, exps_stride, DESCRIPTORS)


@triton.jit
def store_tile(
    matrix, values, ids, mask, row, cols, col, columns, stride, DESCRIPTORS: tl.constexpr
):
    if DESCRIPTORS:
        matrix.store([row, col], values.to(matrix.dtype))
    else:
        # 64-bit: N V passes 2^31.
        at = ids.to(tl.int64)[:, None] * stride + cols[None, :]
        inside = mask[:, None] & (cols < columns)[None, :]
        tl.store(matrix + at, values.to(matrix.dtype.element_ty), inside)


@triton.jit
def halve_columns(z, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half."""
    return tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def slice_columns(z, ROWS: tl.constexpr, COLS: tl.constexpr, SLICES: tl.constexpr):
    """1, 2 or 4 slices of the columns, in order. Worked on one after the other, the temporaries of
    only one take registers."""
    if SLICES == 1:
        parts = (z,)
    else:
        left, right = halve_columns(z, ROWS, COLS)
        if SLICES == 2:
            parts = (left, right)
        else:
            left_left, left_right = halve_columns(left, ROWS, COLS // 2)
            right_left, right_right = halve_columns(right, ROWS, COLS // 2)
            parts = (left_left, left_right, right_left, right_right)
    return parts


@triton.jit
def tile_position(tile, row_tiles, col_tiles, GROUP_ROWS: tl.constexpr):
    """Row tile and column tile of a number: down the rows of a group, then the next column."""
    in_group = GROUP_ROWS * col_tiles
    group = tile // in_group
    first = group * GROUP_ROWS
    height = tl.minimum(row_tiles - first, GROUP_ROWS)
    inside = tile - group * in_group
    return first + inside % height, inside // height


@triton.jit
def linear_exp_kernel(
    hidden,  # (N, H) descriptor or pointer
    weight,  # (V, H) descriptor or pointer
    exps,  # (N, V) descriptor or pointer, or None
    exps_stride,
    bias,  # (V,) float32, or None
    target,  # (N,) int64, column of the target
    anchor,  # (N,) float32
    sums,  # (kinds, column slices, N) float32
    best_index,  # (column slices, N) int32, or None
    rows,  # N
    columns,  # V
    width,  # H
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    scale,
    inner,
    cap,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    col_tiles = tl.cdiv(columns, BLOCK_COLS)
    for tile in range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)):
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
                hidden_step,
                weight_stride,
                weight_step,
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
            rows,
            columns,
            exps_stride,
            scale,
            inner,
            cap,
            BLOCK_ROWS,
            BLOCK_COLS,
            SLICES,
            DESCRIPTORS,
            CAPPED,
            EXACT,
        )


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
    rows,
    columns,
    exps_stride,
    scale,
    inner,
    cap,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Exponentials and sums of a tile of products."""
    own = load_target(target, ids, mask, columns)
    a = tl.load(anchor + ids, mask, 0.0)
    slice_cols: tl.constexpr = BLOCK_COLS // SLICES
    parts = slice_columns(acc, BLOCK_ROWS, BLOCK_COLS, SLICES)
    for i in tl.static_range(SLICES):
        finish_slice(
            parts[i],
            col + i * slice_cols,
            own,
            a,
            ids,
            mask,
            row,
            exps,
            bias,
            sums,
            best_index,
            rows,
            columns,
            exps_stride,
            scale,
            inner,
            cap,
            slice_cols,
            DESCRIPTORS,
            CAPPED,
            EXACT,
        )
