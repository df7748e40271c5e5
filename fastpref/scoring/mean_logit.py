# SPDX-License-Identifier: Apache-2.0
"""The mean logit of each row without looking at its logits: without a cap they are linear, so their
mean is the product with the mean row of the weight, over the ids that no bias of -inf excludes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import vocab_parallel
from .head import Projector
from .types import statistics_dtype

BLOCK = 1 << 22  # elements that are widened at a time


class MeanRow(NamedTuple):
    """Over the vocabulary of all ranks of ``group``; here the sums of this rank's columns."""

    weight: Tensor  # (H,), statistics dtype
    bias: Tensor  # 0-dim
    columns: Tensor  # 0-dim, how many
    scale: float
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, head: Projector, group: dist.ProcessGroup | None) -> MeanRow:
        exact = statistics_dtype(head.weight.dtype)
        weight, bias = head.weight, head.bias
        total = weight.new_zeros(weight.shape[1], dtype=exact)
        allowed = None if bias is None else bias != -torch.inf
        step = max(1, BLOCK // max(1, weight.shape[1]))
        if allowed is None and weight.is_cuda:
            # There the sum widens as it reads.
            step = weight.shape[0]
        for start in range(0, weight.shape[0], max(1, step)):
            rows = slice(start, start + step)
            part = weight[rows]
            if allowed is not None:
                part = torch.where(allowed[rows, None], part, 0)
            total += part.sum(0, dtype=exact)
        columns = total.new_full((), weight.shape[0])
        mean_bias = torch.zeros_like(columns)
        if bias is not None and allowed is not None:
            columns = allowed.sum(dtype=exact)
            mean_bias = torch.where(allowed, bias, 0).sum()
        return cls(total, mean_bias, columns, head.map.scale, group)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N,) of hidden (N, H)."""
        step = max(1, BLOCK // max(1, hidden.shape[1]))
        parts = [torch.mv(part.to(self.weight.dtype), self.weight) for part in hidden.split(step)]
        total = torch.cat(parts) + self.bias
        columns = self.columns
        if self.group is not None:
            both = torch.cat([total, columns[None]])
            total, columns = vocab_parallel.sum_over_ranks(both, self.group).split([len(total), 1])
        return total * self.scale / columns
