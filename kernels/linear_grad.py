# SPDX-License-Identifier: Apache-2.0
"""Products of hidden states with a head, formed again in backward and turned into the gradient with
respect to themselves before they leave the chip.

With t the logit of the raw product z, p[n, v] = exp(t[n, v] - anchor[n]) / norm[n], and the
gradients g, h, k that arrived at logp, lse and entropy H of row n:

    grads[n, v] = dt/dz (p (h - g) - k p (log p + H)),
    at the target y:  dt/dz (g (1 - p_y) + p_y h - k p_y (logp + H)).

Rows are worked through as in linear_exp.py; 2 N H V flop.
"""

import triton
import triton.language as tl

from .linear_exp import load_target, store_slice
from .logit_map import (
    LN2,
    binary_exponents,
    exp2_flushed,
    exp_difference,
    map_logits,
)
from .products import describe_product, load_product, slice_columns, tile_position


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, without cancellation: its Taylor series, 2e-9 off at -1/4."""
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6))))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


# Per-row arguments may be a batch's part of longer vectors: of any alignment.
@triton.jit(
    do_not_specialize=[
        "rows",
        "columns",
        "width",
        "grads_stride",
        "hidden_stride",
        "weight_stride",
    ],
    do_not_specialize_on_alignment=[
        *("bias", "target", "anchor", "norm", "logp"),
        *("grad_logp", "grad_lse", "grad_entropy", "entropy"),
    ],
)
def linear_grad_kernel(
    hidden,  # (N, H) descriptor or pointer
    weight,  # (V, H) descriptor or pointer
    grads,  # (N, V) descriptor or pointer
    grads_stride,
    bias,  # (V,) float32, or None
    target,  # (N,) int64, column of the target
    anchor,  # (N,) float32, and so the others
    norm,
    logp,
    grad_logp,
    grad_lse,  # or None
    grad_entropy,  # or None
    entropy,  # or None
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
        own = load_target(target, ids, mask, columns)
        a = tl.load(anchor + ids, mask, 0.0)
        n = tl.load(norm + ids, mask, 1.0)
        log_n = tl.log(n)
        log_own = tl.load(logp + ids, mask, 0.0)
        # dz of a logit's dt is `scale`, but for the slope.
        g = tl.load(grad_logp + ids, mask, 0.0) * scale
        h = tl.zeros_like(g)
        if grad_lse is not None:
            h = tl.load(grad_lse + ids, mask, 0.0) * scale
        p_own = tl.exp(log_own)
        at_target = one_minus_exp(log_own) * g + p_own * h
        if grad_entropy is not None:
            k = tl.load(grad_entropy + ids, mask, 0.0) * scale
            shift = tl.load(entropy + ids, mask, 0.0)
            # p log p is 0 where p is, also at a logit of -inf.
            at_target -= tl.where(p_own == 0, 0.0, p_own * (log_own + shift) * k)
        slice_cols: tl.constexpr = BLOCK_COLS // SLICES
        # Of log p below.
        unit: tl.constexpr = 1.0 if EXACT else LN2
        parts = slice_columns(acc, BLOCK_ROWS, BLOCK_COLS, SLICES)
        for i in tl.static_range(SLICES):
            z = parts[i]
            first = col + i * slice_cols
            cols = first + tl.arange(0, slice_cols)
            if bias is not None:
                z += tl.load(bias + cols, cols < columns, 0.0)[None, :]
            t, slope = map_logits(z, scale, inner, cap, CAPPED)
            if EXACT:
                log_p = t - a[:, None] - log_n[:, None]
                p = exp_difference(t, a[:, None], True) * (1.0 / n)[:, None]
            else:
                log_p = binary_exponents(z, t, a + log_n, scale, CAPPED)
                p = exp2_flushed(log_p)
            factor = (h - g)[:, None]
            if grad_entropy is not None:
                factor -= (log_p + (shift / unit)[:, None]) * (k * unit)[:, None]
                factor = tl.where(p == 0, 0.0, factor)
            d = p * factor
            d = tl.where(cols[None, :] == own[:, None], at_target[:, None], d)
            if CAPPED:
                d *= slope
            store_slice(
                grads,
                d,
                ids,
                mask,
                row,
                cols,
                first,
                columns,
                grads_stride,
                DESCRIPTORS,
                RAGGED,
                ALIGNED,
            )
