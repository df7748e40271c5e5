# SPDX-License-Identifier: Apache-2.0
"""out[n] = factor[n] matrix[n], multiplied in float32 and rounded once."""

import triton
import triton.language as tl


# Factors may be a part of a longer vector: of any alignment.
@triton.jit(do_not_specialize_on_alignment=["factor"])
def scale_rows_kernel(
    matrix,  # (N, H)
    factor,  # (N,) float32
    out,  # (N, H), may be `matrix`
    width,
    matrix_stride,
    out_stride,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.load(factor + row)
    for start in range(0, width, BLOCK_WIDTH):
        k = start + tl.arange(0, BLOCK_WIDTH)
        value = tl.load(matrix + row * matrix_stride + k, k < width, 0.0).to(tl.float32) * c
        tl.store(out + row * out_stride + k, value.to(out.dtype.element_ty), k < width)
