# SPDX-License-Identifier: Apache-2.0
"""A vocabulary-sharded head: each rank holds some columns of the logits and all rows of hidden.

Two collectives forward (the target logits before the first product, the row sums after it) and one
backward (the hidden gradient); which ones run depends on shapes alone. Without a group every
function is the identity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .statistics import RowSums, merge


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """In place."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


class Columns(NamedTuple):
    """What is normalised and summed over the columns of all ranks of ``group``, or of this one."""

    group: dist.ProcessGroup | None = None

    def log_softmax(self, logits: Tensor) -> Tensor:
        if self.group is None:
            return logits.log_softmax(1)
        return logits - self.logsumexp(logits)[:, None]

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if self.group is None else self.log_softmax(logits).exp_()

    def logsumexp(self, logits: Tensor) -> Tensor:
        """(rows,)."""
        if self.group is None:
            return logits.logsumexp(1)
        top = logits.amax(1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        sums = self.total((logits - top[:, None]).exp_().sum(1))
        # A row of nothing but -inf has no largest logit to subtract.
        return torch.where(top == -torch.inf, top, top + sums.log())

    def total(self, sums: Tensor) -> Tensor:
        """Sums over this rank's columns -> over all; in place."""
        return sum_over_ranks(sums, self.group)


THIS_RANK = Columns()


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
