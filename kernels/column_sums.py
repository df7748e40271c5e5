# SPDX-License-Identifier: Apache-2.0
"""out[p, v] = sum of weights[n] matrix[n, v] over the rows n of part p: a bias's gradient.

A target's column has one large term among thousands of tiny ones: products and sums of BLOCK_ROWS
rows are in float32, the totals in float64. Each program owns its columns of one part, and the parts
are added afterwards, in order: no atomics, the same bits every time.
"""

import triton
import triton.language as tl

ROWS, COLS = 32, 128  # of one program's block
WARPS = 4
REGISTERS = 128  # of a thread at most; see tiles.py
MOST_PARTS = 16


# Sizes that follow the data, and where a row's weight lies, must not compile the kernel anew.
@triton.jit(
    do_not_specialize=["rows", "part_rows", "cols"], do_not_specialize_on_alignment=["weights"]
)
def column_sums_kernel(
    matrix,  # (N, V)
    weights,  # (N,) float32, or None: 1
    out,  # (parts, V) float64
    rows,
    part_rows,
    cols,
    matrix_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    v = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    part = tl.program_id(1)
    stop = tl.minimum(rows, (part + 1) * part_rows)
    total = tl.zeros((BLOCK_COLS,), dtype=tl.float64)
    for start in range(part * part_rows, stop, BLOCK_ROWS):
        n = start + tl.arange(0, BLOCK_ROWS)
        inside = (n < stop)[:, None] & (v < cols)[None, :]
        at = n.to(tl.int64)[:, None] * matrix_stride + v[None, :]
        value = tl.load(matrix + at, inside, 0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + n, n < stop, 0.0)[:, None]
        total += tl.sum(value, 0).to(tl.float64)
    tl.store(out + part.to(tl.int64) * cols + v, total, v < cols)
