# SPDX-License-Identifier: Apache-2.0
"""The logit of each row's target, from its own dot product, added up in float32.

    raw[n] = hidden[n] . weight[y] + bias[y],   logit[n] = the logit of raw[n] (logit_map.py)

with y the row's target; -1 in ``column`` and NaN in both where y is no column of the weight.
"""

import triton
import triton.language as tl

from .logit_map import map_logits

ROWS, WIDTH = 16, 64  # of one program's block


# A batch's targets may be a part of a longer vector: of any alignment.
@triton.jit(
    do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["bias", "target"]
)
def target_logits_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,), or None
    target,  # (N,) int64
    column,  # (N,) int64
    raw,  # (N,) float32
    logit,  # (N,) float32
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    scale,
    inner,
    cap,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
):
    ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    y = tl.load(target + ids, ids < rows, -1)
    here = (y >= 0) & (y < columns)
    hidden_rows = hidden + ids[:, None] * hidden_stride
    weight_rows = weight + tl.where(here, y, 0)[:, None] * weight_stride
    parts = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    # With one stage, or three, the compiler spills for sm_90.
    for start in tl.range(0, width, BLOCK_WIDTH, num_stages=2):
        k = (start + tl.arange(0, BLOCK_WIDTH))[None, :]
        inside = here[:, None] & (k < width)
        a = tl.load(hidden_rows + k, inside, 0.0).to(tl.float32)
        b = tl.load(weight_rows + k, inside, 0.0).to(tl.float32)
        parts += a * b
    z = tl.where(here, tl.sum(parts, 1), float("nan"))
    if bias is not None:
        z += tl.load(bias + y, here, 0.0)
    t, _ = map_logits(z, scale, inner, cap, CAPPED)
    mask = ids < rows
    tl.store(column + ids, tl.where(here, y, -1), mask)
    tl.store(raw + ids, z, mask)
    tl.store(logit + ids, t, mask)
