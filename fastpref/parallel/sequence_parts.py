# SPDX-License-Identifier: Apache-2.0
"""Sums over sequences whose tokens lie on several ranks (context parallelism)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_of_sequence_parts(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B,) sums of each rank's own tokens -> (B,) of all tokens, on every rank.

    The gradient of a rank's part is that of the whole: every rank then computes the same loss, and
    pushes it back through its own tokens.
    """
    if group is None:
        return parts
    total: Tensor = _SumOfSequenceParts.apply(parts, group)  # type: ignore[no-untyped-call]
    return total


class _SumOfSequenceParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = parts.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
