# SPDX-License-Identifier: Apache-2.0
"""The mean logit of each row, and its gradient.

Without a cap logits are linear, and nobody has to look at them: their mean is the product with the
mean row of the weight, over the ids that no bias of -inf excludes, and with g the gradient that
arrives, V the number of those ids,

    d hidden = g scale / V sum_v weight_v,   d weight_v = scale / V sum_n g_n hidden_n.

Under a cap the gradient goes through each logit's slope; then it is added to that of the logits
where these are formed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import vocab_parallel
from .backends import RowBackend, UpstreamGradient
from .backends.torch import with_bias
from .head import Projector
from .scaled import BLOCK as SLOPES
from .scaled import add_outer
from .slab import Projection
from .types import statistics_dtype

BLOCK = 1 << 22  # elements that are widened at a time


class MeanRow(NamedTuple):
    """Sums over this rank's columns of what is a mean over those of all ranks of ``group``."""

    weight: Tensor  # (H,), statistics dtype
    bias: Tensor  # 0-dim
    columns: Tensor  # 0-dim, how many all ranks hold
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
        columns = vocab_parallel.sum_over_ranks(columns, group)
        return cls(total, mean_bias, columns, head.map.scale, group)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N,) of hidden (N, H)."""
        step = max(1, BLOCK // max(1, hidden.shape[1]))
        parts = [torch.mv(part.to(self.weight.dtype), self.weight) for part in hidden.split(step)]
        total = vocab_parallel.sum_over_ranks(torch.cat(parts) + self.bias, self.group)
        return total * self.scale / self.columns

    def add_gradients(
        self,
        upstream: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
    ) -> None:
        """To those of this rank's columns, in place.

        Args:
            upstream: (N,); a row where it is 0 takes no part, whatever it holds.
            hidden: (N, trained columns).
            bias: (V,) of this rank.
        """
        factor = upstream * self.scale / self.columns
        if d_hidden is not None:
            add_outer(d_hidden, factor, self.weight)
        if d_weight is not None:
            allowed = None if bias is None else (bias != -torch.inf).to(factor.dtype)
            add_outer(d_weight, allowed, weighted_sum(hidden, factor))
        if d_bias is not None and bias is not None:
            d_bias += torch.where(bias != -torch.inf, factor.sum(dtype=d_bias.dtype), 0)


def weighted_sum(matrix: Tensor, factor: Tensor) -> Tensor:
    """sum_n factor_n matrix_n, (columns,) in the dtype of ``factor``."""
    total = factor.new_zeros(matrix.shape[1])
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    for part, one in zip(matrix.split(step), factor.split(step), strict=True):
        rows = torch.where(one[:, None] == 0, 0, part).to(one.dtype)
        total += torch.mv(rows.t(), one)
    return total


def add_capped_gradient(
    backend: RowBackend, at: Projection, gradient: UpstreamGradient, upstream: Tensor
) -> None:
    """The tile of raw products becomes the gradient at them: that of ``gradient``, and slope times
    ``upstream`` (rows,), scaled for one logit."""
    step = max(1, SLOPES // max(1, at.products.tile.shape[1]))
    for start in range(0, len(upstream), step):
        rows = slice(start, start + step)
        part, own = at.of_rows(rows), upstream[rows, None]
        slope = part.slab.map.slope(with_bias(part.products)) * own
        backend.logit_grad(part, gradient.of_rows(rows))
        part.products.tile.add_(slope)
