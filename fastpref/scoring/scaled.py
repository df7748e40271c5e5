# SPDX-License-Identifier: Apache-2.0
"""Matrices added up, each row scaled by a number of its own: a few rows at a time, since torch
widens on a CPU what it multiplies by wider numbers."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements


def temporary_bytes(dtype: torch.dtype) -> int:
    """Most memory that the functions below take beside their arguments."""
    return 4 * BLOCK * max(4, dtype.itemsize)


def add_scaled(total: Tensor, matrix: Tensor, factor: Tensor) -> None:
    """total[i] += factor[i] matrix[i], rounded once; a factor of 0 takes nothing, whatever is
    there."""
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    parts = zip(total.split(step), matrix.split(step), factor.split(step), strict=True)
    for own, other, one in parts:
        scale = one[:, None]
        own.addcmul_(torch.where(scale == 0, 0, other), scale)


def add_outer(total: Tensor, column: Tensor | None, row: Tensor) -> None:
    """total[i] += column[i] row, rounded once; None is a column of ones, and an entry of 0 takes
    nothing, whatever the row holds."""
    # Elsewhere casts are made in registers, and launches are what costs.
    block = BLOCK if total.device.type == "cpu" else BLOCK << 4
    step = max(1, block // max(1, total.shape[1]))
    for start in range(0, total.shape[0], step):
        own = total[start : start + step]
        if column is None:
            own.add_(row)
        else:
            scale = column[start : start + step, None]
            own.addcmul_(torch.where(scale == 0, 0, row), scale)


def scaled(matrix: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out[i] = factor[i] matrix[i]."""
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    parts = zip(out.split(step), matrix.split(step), factor.split(step), strict=True)
    for own, other, one in parts:
        torch.mul(other, one[:, None], out=own)
    return out
