# SPDX-License-Identifier: Apache-2.0
"""A kernel with a fault, to see that it is found."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def read_around_kernel(values, out, count, more):
    at = tl.arange(0, 32) - 8
    mask = (at >= -more) & (at < count + more)
    total = tl.sum(tl.where(mask, tl.load(values + at, mask, 0.0), 0.0))
    tl.store(out, total)


def read_around(values: Tensor, more: int) -> Tensor:
    """The sum of ``values`` and of ``more`` before and after them."""
    out = torch.empty(1, dtype=torch.float32, device="cpu")
    read_around_kernel[(1,)](values, out, len(values), more)
    return out
