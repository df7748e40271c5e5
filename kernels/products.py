# SPDX-License-Identifier: Apache-2.0
"""Tiles of products of hidden states with a head, in float32: the main loops of linear_exp.py,
linear_grad.py and reanchor.py, and which tile of all comes when."""

import triton
import triton.language as tl


@triton.jit
def round_to_tf32(x):
    """To the nearest number of 10 mantissa bits, of two equally near the one further from 0: what
    matrix units take of a float32, which cut off the others."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # Not every NaN stays one above.
    return tl.where(x == x, rounded, x)


@triton.jit
def add_dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b^T."""
    if PRECISION == "tf32":
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    return tl.dot(a, b.T, acc, input_precision=PRECISION)


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
    weight_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden[rows] @ weight[cols].T in float32, loaded through pointers. Rows start at multiples of
    16 bytes and span as many."""
    piece: tl.constexpr = 128 // hidden.dtype.element_ty.primitive_bitwidth
    # Of these the compiler knows what they are multiples of.
    width = width // piece * piece
    hidden_stride = hidden_stride // piece * piece
    weight_stride = weight_stride // piece * piece
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    inner = tl.arange(0, BLOCK_WIDTH)
    # 64-bit: N H and V H both pass 2^31.
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    weight_rows = weight + cols.to(tl.int64)[:, None] * weight_stride
    for start in range(0, width, BLOCK_WIDTH):
        k = (start + inner)[None, :]
        inside = k < width
        a = tl.load(hidden_rows + k, row_mask[:, None] & inside, 0.0)
        b = tl.load(weight_rows + k, (cols < columns)[:, None] & inside, 0.0)
        acc = add_dot(a, b, acc, PRECISION)
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
        acc = add_dot(a, b, acc, PRECISION)
    return acc


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
