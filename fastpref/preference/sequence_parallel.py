# SPDX-License-Identifier: Apache-2.0
"""Sums over sequences whose tokens lie on several ranks (context parallelism)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B,) of each rank's own tokens -> (B,) of all tokens, on every rank.

    The gradient of a rank's part is that of the whole: every rank then computes the same loss, and
    pushes it back through its own tokens.
    """
    if group is None:
        return sums
    total: Tensor = _SumOverRanks.apply(sums, group)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
