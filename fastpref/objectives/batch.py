# SPDX-License-Identifier: Apache-2.0
"""Values of a whole batch that lies on several ranks, for objectives whose losses depend on it.

Ranks hold any number of responses, none too, and every rank calls the same collectives whatever it
holds. Gradients are those of the sum over ranks of what each differentiates: where every rank sums
its losses, losses and gradients together are those of one process with the whole batch. So every
rank runs backward as well.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


# An operator, so that no transform of torch gets between the start of a collective and the wait.
@torch.library.custom_op("fastpref::sum_over_ranks", mutates_args=())
def _sum_over_ranks(values: Tensor, group_name: str) -> Tensor:
    functional = torch.ops._c10d_functional  # the module around them takes 0.1 s to import
    started = functional.all_reduce(values, "sum", group_name)
    return cast(Tensor, functional.wait_tensor(started))


@_sum_over_ranks.register_fake
def _(values: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, group: dist.ProcessGroup) -> Tensor:
        return cast(Tensor, _sum_over_ranks(values, group.group_name))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, dist.ProcessGroup], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.group), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None], values: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, int]:
        return total(values, group), in_dims[0]


def total(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise sum over ranks, of values shaped alike on all of them. Differentiable."""
    if group is None:
        return values
    summed: Tensor = _Total.apply(values, group)  # type: ignore[no-untyped-call]
    return summed


def count_and_sum(values: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """How many rows (B, ...) all ranks hold, 0-dim, and the sum over these, (...)."""
    summed = values.sum(0)
    count = torch.full((), len(values), dtype=summed.dtype, device=values.device)
    if group is None:
        return count, summed
    both = total(torch.cat([count.view(1), summed.flatten()]), group)
    return both[0], both[1:].view_as(summed)


def mean(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Of the (B,) values of all ranks."""
    if group is None:
        return values.mean()
    count, summed = count_and_sum(values, group)
    return summed / count.clamp(min=1)


def mean_and_std(values: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Of the (B,) values of all ranks; the deviation is a sample's (n - 1), and 0 of one value or
    of equal ones."""
    center = mean(values, group)
    # Once more of what is left, or rounding would give equal values a spread.
    center = center + mean(values - center, group)
    count, squares = count_and_sum((values - center).square(), group)
    return center, (squares / (count - 1).clamp(min=1)).sqrt()


def log_mean_exp(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log of the mean of exp(values), (B,) on each rank, over all of them. Differentiable."""
    logs = torch.stack([values.logsumexp(0), torch.zeros_like(values).logsumexp(0)])
    if group is not None:
        own = Rows(dist.get_rank(group), 1, dist.get_world_size(group), group)
        logs = own.gather(logs[None]).logsumexp(0)
    return logs[0] - logs[1]


class Rows(NamedTuple):
    """The rows that this rank holds of the whole batch, in which ranks follow one another."""

    first: int
    held: int
    whole: int  # number of all rows
    group: dist.ProcessGroup | None

    def gather(self, values: Tensor) -> Tensor:
        """(held, ...) of each rank -> (whole, ...). Differentiable."""
        if self.group is None:
            return values
        # As a sum of what each rank pads with zeros: ranks differ in size, and a number is exact
        # beside zeros.
        after = self.whole - self.first - self.held
        padding = (0, 0) * (values.dim() - 1) + (self.first, after)
        return total(F.pad(values, padding), self.group)

    def own(self, gathered: Tensor) -> Tensor:
        """This rank's rows of (whole, ...)."""
        return gathered.narrow(0, self.first, self.held)


def rows_of(values: Tensor, group: dist.ProcessGroup | None) -> Rows:
    """Where the rows of ``values`` lie. With a group the host waits for the sizes of all ranks."""
    if group is None:
        return Rows(0, len(values), len(values), None)
    rank = dist.get_rank(group)
    sizes = values.new_zeros(dist.get_world_size(group), dtype=torch.int64)
    sizes[rank] = len(values)
    counts = total(sizes, group).tolist()
    return Rows(sum(counts[:rank]), len(values), sum(counts), group)
