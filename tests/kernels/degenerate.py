# SPDX-License-Identifier: Apache-2.0
"""What the tests of degenerate rows share: inputs of exact products, and how near is right."""

import pytest
import torch
from torch import Tensor

from fastpref.scoring.backends import unavailable_reason

DTYPES = {
    "torch": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpp": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    # In Triton's interpreter.
    "rows": (torch.float32, torch.float16),
    "triton": (torch.float32, torch.float16),
}
AVAILABLE = [name for name in DTYPES if unavailable_reason(name, "cpu") is None]
BACKENDS = [
    pytest.param(name, marks=pytest.mark.heavy if name in ("rows", "triton") else [])
    for name in AVAILABLE
]
INF = float("inf")


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, so that products are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).double()


def only(columns: list[int], vocab: int = 40) -> Tensor:
    """A bias of -inf at all others."""
    bias = torch.full((vocab,), -INF).double()
    bias[columns] = 0
    return bias


def tolerance(dtype: torch.dtype, size: float) -> float:
    """Of numbers of that size, and of sums of those that are all but 0."""
    info = torch.finfo(dtype)
    return 64 * info.eps * max(size, info.smallest_normal)
