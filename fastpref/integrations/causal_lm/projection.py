# SPDX-License-Identifier: Apache-2.0
"""What a linear head multiplies by."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Shards(NamedTuple):
    """Whose ranks hold rows of a weight each, in their order."""

    group: dist.ProcessGroup
    start: int  # first row of this rank
    total: int  # rows of all


class Projection(NamedTuple):
    """logits = hidden (weight + scale B A)^T + bias."""

    weight: Tensor  # (V, H), or this rank's rows
    bias: Tensor | None  # (V,)
    lora: tuple[Tensor, Tensor, float] | None = None  # A (r, H), B (V, r), scale
    shards: Shards | None = None

    def rows_below(self, size: int) -> tuple[int, int] | None:
        """Of a vocabulary that ends at ``size``, the ids of the rows here; None: all rows."""
        rows = self.weight.shape[0]
        if self.shards is None:
            # A weight that is partitioned now has no rows here.
            return None if rows == size else (0, size)
        _, start, total = self.shards
        return None if total == size else (min(start, size), min(start + rows, size))
