# SPDX-License-Identifier: Apache-2.0
"""The discrete cosine transform as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.checks import is_integer


def dct_matrix(
    size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """(size, size), orthonormal: ``rows @ dct_matrix(size)`` is the DCT-II of each row, column k
    being cos(pi (n + 1/2) k / size) for n from 0, normalised; of ``dtype``, on ``device``, computed
    in float64."""
    if not is_integer(size) or size < 1:
        raise ValueError(f"size must be an int of at least 1, got {size!r}; pass the hidden size")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a torch.device or its name, got {device!r}") from None
    n = torch.arange(size, dtype=torch.float64, device=device)
    # Angles repeat after 4 size half steps: reduced, each is as exact as the first.
    steps: Tensor = (2 * n[:, None] + 1) * n % (4 * size)
    matrix: Tensor = torch.cos(steps * (torch.pi / (2 * size))) * (2 / size) ** 0.5
    matrix[:, 0] = size**-0.5
    return matrix.to(dtype)
