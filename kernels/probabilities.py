# SPDX-License-Identifier: Apache-2.0
"""Exponentials that linear_exp.py kept in halves as logarithms, taken in place.

A half ends at exp(11), and only at the end of a row is it known by what to divide. Until then its
16 bits hold the logarithm, l = t - anchor (plus that of the slope under a cap), in 1024ths:

    code = round(1024 (l + 24)),   l in (-24, 40);   0 is -inf, as at the row's target

A row with a larger l overflows and is projected again (row_sums.py); below -24 exp(l) is 0 in a
half. The error is a 2048th wherever l lies, that of a half itself; a float16 l is off by up to a
64th. Once the row's sum S is known,

    offset[n] = log(S + exp(target logit - anchor)),   the last term only where the target is here
    matrix[n, v] = exp(l - offset)

and with neither term there is nothing to scale: the offset is 0. A NaN in either reaches the whole
row. One program takes a piece of one row. Bytes: the tile is read once and written once.
"""

import triton
import triton.language as tl

COLS = 4096  # of one program's piece
STEPS = tl.constexpr(1024.0)
LEAST = tl.constexpr(-24.0)
# From here to twice as far float32 holds just the whole numbers, counted in its last bits.
WHOLE = tl.constexpr(8388608.0)
WHOLE_BITS = tl.constexpr(0x4B000000)


@triton.jit
def pack_logarithms(x):
    """Codes, as the bits of halves."""
    x = tl.minimum(tl.maximum(x, LEAST), LEAST + 65535 / STEPS)
    rounded = x * STEPS + (WHOLE - LEAST * STEPS)
    return rounded.to(tl.int32, bitcast=True).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def exponentials_of(packed, offset):
    code = packed.to(tl.uint16, bitcast=True).to(tl.uint32)
    steps = (code | WHOLE_BITS).to(tl.float32, bitcast=True) - WHOLE
    x = tl.where(code == 0, -float("inf"), steps / STEPS + LEAST)
    return tl.exp(x - offset).to(tl.float16)


@triton.jit(
    do_not_specialize=["columns", "matrix_stride"],
    do_not_specialize_on_alignment=["target", "target_logit"],
)
def probabilities_kernel(
    matrix,  # (N, V) float16: codes, then exponentials
    matrix_stride,
    target,  # (N,) int64, column of the target
    target_logit,  # (N,) float32
    anchor,  # (N,) float32
    sums,  # (N,) float32
    offset,  # (N,) float32, written
    columns,  # V
    BLOCK_COLS: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows start at multiples of 16 bytes
):
    blocks = tl.cdiv(columns, BLOCK_COLS)
    program = tl.program_id(0)
    # 64-bit: N V passes 2^31.
    row = (program // blocks).to(tl.int64)
    block = program % blocks
    start = row * matrix_stride
    if ALIGNED:
        start = tl.multiple_of(start, 8)
    # Wide accesses need a bound in whole pieces; what is left of a row goes one by one.
    whole = columns // 8 * 8
    at = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    rest = whole + tl.arange(0, 8)
    inside, left = at < whole, (rest < columns) & (block == blocks - 1)
    packed = tl.load(matrix + start + at, inside, 0.0)
    packed_rest = tl.load(matrix + start + rest, left, 0.0)
    y = tl.load(target + row)
    own = tl.exp(tl.load(target_logit + row) - tl.load(anchor + row))
    norm = tl.load(sums + row) + tl.where((y >= 0) & (y < columns), own, 0.0)
    shift = tl.where(norm == 0, 0.0, tl.log(norm))
    tl.store(offset + row, shift, block == 0)
    tl.store(matrix + start + at, exponentials_of(packed, shift), inside)
    tl.store(matrix + start + rest, exponentials_of(packed_rest, shift), left)
