# SPDX-License-Identifier: Apache-2.0
"""Sums over the rows of a tile, a bias's gradient.

In a single sum in float32 thousands of tiny probabilities would be lost, one after the other, on
the one large term of a target: so over a few rows at a time, and the total in float64.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..types import statistics_dtype
from . import import_failure

FEW_ROWS = 32
# Elements of a temporary off the CPU, where launches cost, and without Triton.
_BLOCK = 1 << 25


def add_column_sums(total: Tensor, matrix: Tensor, weights: Tensor | None) -> None:
    """total += matrix^T weights.

    Args:
        total: (V,) float64.
        matrix: (N, V).
        weights: (N,) in the statistics' dtype; None: 1.
    """
    if not matrix.numel():
        return
    if launches(matrix.device.type, matrix.dtype) and _serves(matrix, weights):
        from . import glue

        glue.add_column_sums(total, matrix, weights)
    elif matrix.device.type == "cpu":
        _by_products(total, matrix, weights)
    else:
        _by_blocks(total, matrix, weights)


def temporary_bytes(rows: int, cols: int, device_type: str, dtype: torch.dtype) -> int:
    """Most memory that sums over a (rows, cols) tile take beside it."""
    exact = statistics_dtype(dtype).itemsize
    if launches(device_type, dtype):
        from . import glue

        return (glue.column_parts(rows, cols) + 1) * cols * 8
    if device_type == "cpu":
        return 0 if dtype.itemsize == exact else min(rows, FEW_ROWS) * cols * exact
    return 3 * min(rows, _block_rows(cols)) * cols * exact


@functools.cache
def launches(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel serves."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if import_failure("glue") is not None:
        return False
    from . import glue

    return dtype in glue.DTYPES


def _serves(matrix: Tensor, weights: Tensor | None) -> bool:
    """Whether the kernel reads this matrix, and has been seen right on its device."""
    from . import glue, probe

    # Rows that start at multiples of 16 elements, or not, are other kernels.
    aligned = matrix.stride(0) % 16 == 0
    cols = 304 if aligned else 300

    def check() -> str:
        # Whole numbers: their sums are exact.
        given = (
            torch.arange(70 * cols, device=matrix.device, dtype=torch.int64)
            .fmod(7)
            .to(matrix.dtype)
        )
        given = given.view(70, cols)
        some = None if weights is None else given[:, 1].to(weights.dtype).contiguous()
        totals = given.new_zeros((2, cols), dtype=torch.float64)
        glue.add_column_sums(totals[0], given, some)
        _by_blocks(totals[1], given, some)
        return "" if torch.equal(*totals) else "column sums differ from torch's"

    kernel = "column_sums", matrix.dtype, weights is None, aligned
    return matrix.stride(1) == 1 and probe.passes("rows", kernel, matrix.device, check)


def _by_products(total: Tensor, matrix: Tensor, weights: Tensor | None) -> None:
    exact = statistics_dtype(matrix.dtype)
    if weights is None:
        weights = matrix.new_ones(matrix.shape[0], dtype=exact)
    parts = zip(matrix.split(FEW_ROWS), weights.split(FEW_ROWS), strict=True)
    for part, one in parts:
        total += torch.mv(part.to(exact).t(), one)


def _block_rows(cols: int) -> int:
    """Whole groups of few rows."""
    return max(1, _BLOCK // (FEW_ROWS * max(1, cols))) * FEW_ROWS


def _by_blocks(total: Tensor, matrix: Tensor, weights: Tensor | None) -> None:
    exact, cols = statistics_dtype(matrix.dtype), matrix.shape[1]
    for start in range(0, matrix.shape[0], _block_rows(cols)):
        rows = slice(start, start + _block_rows(cols))
        part = matrix[rows].to(exact)
        if weights is not None:
            part = part * weights[rows, None]
        whole = part.shape[0] - part.shape[0] % FEW_ROWS
        sums = part[:whole].view(-1, FEW_ROWS, cols).sum(1)
        total += sums.sum(0, dtype=torch.float64)
        total += part[whole:].sum(0)
