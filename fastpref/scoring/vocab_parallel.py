# SPDX-License-Identifier: Apache-2.0
"""A vocabulary-sharded head: each rank holds some columns of the logits and all rows of hidden.

Two collectives forward (the target logits before the first product, the row sums after it) and one
backward (the hidden gradient); which ones run depends on shapes alone. Without a group every
function is the identity.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .head import Shard
from .statistics import RowSums, merge


def shard_range(group: dist.ProcessGroup | None, columns: int, device: torch.device) -> Shard:
    if group is None:
        return Shard(0, columns, columns)
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes[dist.get_rank(group)] = columns
    dist.all_reduce(sizes, group=group)
    # Once per call and before any product; equal shards could be computed, uneven ones cannot.
    counts = sizes.tolist()
    return Shard(sum(counts[: dist.get_rank(group)]), sum(counts), max(counts))


def vocabulary_size(group: dist.ProcessGroup | None, columns: int, device: torch.device) -> int:
    """Columns of all ranks together."""
    return shard_range(group, columns, device).total


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """In place."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def merge_ranks(sums: RowSums, group: dist.ProcessGroup | None) -> RowSums:
    """Row sums over the whole vocabulary, ranks in order, so that every rank computes the same
    bits."""
    if group is None:
        return sums
    present = [value for value in sums if value is not None]
    # Vocabulary ids are far below 2^53: float64 carries them exactly beside the sums.
    local = torch.stack([value.double() for value in present])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    return merge([_restore(sums, part) for part in gathered])


def _restore(like: RowSums, values: Tensor) -> RowSums:
    rows = iter(values)
    values_of = (None if old is None else next(rows).to(old.dtype) for old in like)
    return RowSums._make(values_of)
