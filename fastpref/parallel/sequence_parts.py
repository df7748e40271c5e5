# SPDX-License-Identifier: Apache-2.0
"""Rows whose tokens lie on several ranks (context parallelism): their sums, and the rows whole.

Every rank then computes the same loss, and pushes its gradient back through its own tokens alone:
backward makes no collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def sum_of_sequence_parts(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B,) sums of each rank's own tokens -> (B,) of all tokens, on every rank.

    The gradient of a rank's part is that of the whole.
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


def whole_rows(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """(B, T) each, of any dtypes, of a rank's own tokens -> (B, sum of T) of all, on every rank.

    Tokens are in the order of the ranks, which hold any number of them each, none too; the host
    waits for these numbers. Two collectives, one where there is no token at all. The gradient of a
    rank's part is its part of the whole's.

    Raises:
        ValueError: on every rank, where ranks pass different rows or dtypes.
    """
    rows, own = parts[0].shape
    sizes = [one.element_size() for one in parts]
    widths = _widths(rows, own, sum(sizes), group, parts[0].device)
    # As bytes, so that numbers of every dtype go at once and arrive as they are.
    told = torch.cat([one.detach().flatten().view(torch.uint8) for one in parts])
    told = F.pad(told, (0, rows * sum(sizes) * (max(widths) - own)))
    found = [torch.zeros_like(told) for _ in widths]
    if told.numel():
        dist.all_gather(found, told, group=group)
    rank, whole, skipped = dist.get_rank(group), [], 0
    for part, size in zip(parts, sizes, strict=True):
        of_ranks = []
        for one, width in zip(found, widths, strict=True):
            first, count = rows * width * skipped, rows * width * size
            # Copied: bytes become numbers where these are aligned.
            numbers = one[first : first + count].clone().view(part.dtype)
            of_ranks.append(numbers.view(rows, width))
        of_ranks[rank] = part  # with its gradient
        whole.append(torch.cat(of_ranks, 1))
        skipped += size
    return whole


def _widths(
    rows: int, width: int, size: int, group: dist.ProcessGroup, device: torch.device
) -> list[int]:
    """Tokens of a row on each rank; all hold ``rows`` of them, of ``size`` bytes a token."""
    own = torch.tensor([rows, size, width], dtype=torch.int64, device=device)
    found = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    table = torch.stack(found).tolist()
    if any(one[:2] != table[0][:2] for one in table):
        ranks = dist.get_process_group_ranks(group)
        shown = "; ".join(
            f"rank {rank} has {one[0]} rows, {one[1]} bytes a token"
            for rank, one in zip(ranks, table, strict=True)
        )
        raise ValueError(
            f"the ranks of seq_group hold tokens of the same rows, with the same dtypes and extras "
            f"of tokens: {shown}. Pass the same rows and extras on every rank"
        )
    return [one[2] for one in table]
