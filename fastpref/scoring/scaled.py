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


def scaled(matrix: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out[i] = factor[i] matrix[i]."""
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    parts = zip(out.split(step), matrix.split(step), factor.split(step), strict=True)
    for own, other, one in parts:
        torch.mul(other, one[:, None], out=own)
    return out
