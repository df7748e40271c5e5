# SPDX-License-Identifier: Apache-2.0
"""dot[n] = hidden[n] . weight[index[n]], added up in float32: the target's raw product."""

import triton
import triton.language as tl


@triton.jit
def gather_dot_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    index,  # (N,) int64, within [0, V)
    dot,  # (N,) float32
    rows,
    width,
    hidden_stride,
    weight_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = ids < rows
    hidden_rows = hidden + ids[:, None] * hidden_stride
    weight_rows = weight + tl.load(index + ids, mask, 0)[:, None] * weight_stride
    parts = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        k = (start + tl.arange(0, BLOCK_WIDTH))[None, :]
        inside = mask[:, None] & (k < width)
        a = tl.load(hidden_rows + k, inside, 0.0).to(tl.float32)
        b = tl.load(weight_rows + k, inside, 0.0).to(tl.float32)
        parts += a * b
    tl.store(dot + ids, tl.sum(parts, 1), mask)
