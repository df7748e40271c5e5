# SPDX-License-Identifier: Apache-2.0
"""Launches of the small Triton kernels between the products: one each, without a host sync. What
they do not read goes through plain torch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...kernels import column_sums, row_scores
from ...kernels import scale_rows as scaling
from ...kernels import target_logits as targets
from ..rows import TargetLogits
from ..slab import Slab
from ..statistics import RowScores, RowSums
from ..types import LogitMap
from . import torch as torch_backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def no_nvidia_gpu() -> str | None:
    """Why no Triton kernel of this package can run on CUDA tensors, or None when some can."""
    if torch.version.hip is not None:
        return (
            "its kernels are written for NVIDIA GPUs and this torch is for ROCm; use backend='auto'"
        )
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU; use backend='auto'"
    return None


def matrices_supported(*matrices: Tensor) -> str | None:
    """Why the kernels cannot read these, or None when they can."""
    for one in matrices:
        if one.dtype not in DTYPES:
            return f"matrices must be bfloat16, float16 or float32, got {one.dtype}"
        if one.stride(1) != 1:
            return f"matrices must have contiguous rows, got strides {one.stride()}"
    return None


def target_logits(hidden: Tensor, slab: Slab, target: Tensor) -> TargetLogits:
    weight, bias, map = slab
    if matrices_supported(hidden, weight) is not None:
        return torch_backend.target_logits(hidden, slab, target)
    raw = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    found = TargetLogits(torch.empty_like(target), raw, torch.empty_like(raw))
    if raw.numel():
        targets.target_logits_kernel[(triton.cdiv(raw.numel(), targets.ROWS),)](
            hidden,
            weight,
            bias,
            target,
            *found,
            hidden.shape[0],
            *weight.shape,
            hidden.stride(0),
            weight.stride(0),
            *map_arguments(map),
            BLOCK_ROWS=targets.ROWS,
            BLOCK_WIDTH=targets.WIDTH,
            CAPPED=map.cap != 0,
        )
    return found


def settle(
    sums: RowSums, own: TargetLogits, exps: Tensor | None, map: LogitMap
) -> tuple[RowScores, Tensor]:
    if sums.sum.dtype != torch.float32:
        return torch_backend.settle(sums, own, exps, map)
    rows = sums.sum.shape[0]
    out = sums.sum.new_empty((5, padded(rows)))
    if rows:
        row_scores.row_scores_kernel[(triton.cdiv(rows, row_scores.ROWS),)](
            sums.sum,
            sums.anchor,
            sums.offset,
            sums.best,
            *own,
            exps,
            out,
            rows,
            out.shape[1],
            0 if exps is None else exps.stride(0),
            *map_arguments(map),
            BLOCK_ROWS=row_scores.ROWS,
            CAPPED=map.cap != 0,
        )
    *scores, scale = out[:, :rows]
    return RowScores(*scores), scale


def scale_rows(rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    if matrices_supported(rows, out) is not None:
        return torch_backend.scale_rows(rows, factor, out)
    if rows.numel():
        scaling.scale_rows_kernel[(rows.shape[0],)](
            rows, factor, out, rows.shape[1], rows.stride(0), out.stride(0), BLOCK_WIDTH=1024
        )
    return out


def column_parts(rows: int, cols: int) -> int:
    """In how many parts a tile's columns are summed: enough programs for a GPU, of enough rows."""
    programs = triton.cdiv(cols, column_sums.COLS)
    parts = min(column_sums.MOST_PARTS, 1024 // programs, triton.cdiv(rows, 256))
    return max(1, int(parts))


def add_column_sums(total: Tensor, matrix: Tensor, weights: Tensor | None) -> None:
    """total (V,) += matrix^T weights, in float64; weights of None are 1."""
    rows, cols = matrix.shape
    parts = column_parts(rows, cols)
    sums = total.new_empty((parts, cols))
    column_sums.column_sums_kernel[(triton.cdiv(cols, column_sums.COLS), parts)](
        matrix,
        weights,
        sums,
        rows,
        triton.cdiv(triton.cdiv(rows, parts), column_sums.ROWS) * column_sums.ROWS,
        cols,
        matrix.stride(0),
        BLOCK_ROWS=column_sums.ROWS,
        BLOCK_COLS=column_sums.COLS,
        num_warps=column_sums.WARPS,
        maxnreg=column_sums.REGISTERS,
    )
    total += sums[0] if parts == 1 else sums.sum(0)


def padded(rows: int) -> int:
    """From one vector over ``rows`` to the next: a multiple of 16, else kernels are compiled anew
    for numbers and addresses that are none."""
    return rows + -rows % 16


def map_arguments(map: LogitMap) -> tuple[float | Tensor, ...]:
    """scale, scale / cap and cap, which each row has of its own where it has a factor."""
    scale, cap, factor = map
    inner = scale / cap if cap else 0.0
    if factor is None:
        return scale, inner, cap
    # Of memory of their own: a part of a vector may lie at any address, for which kernels are
    # compiled anew.
    return factor * scale, torch.full_like(factor, inner), factor * cap
