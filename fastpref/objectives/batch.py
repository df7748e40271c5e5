# SPDX-License-Identifier: Apache-2.0
"""Values of a whole batch that lies on several ranks, for objectives whose losses depend on it.

Every rank holds the same number of responses. With ``losses.mean()`` on each rank and gradients
averaged over ranks, as DDP does, an objective written on gathered values has the loss and gradients
of one process with the whole batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B, ...) of each rank -> (ranks B, ...), in the order of ranks. Differentiable."""
    if group is None:
        return values
    values = values.contiguous()
    if values.requires_grad:
        return torch.cat(all_gather(values, group=group))
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)


def own(gathered: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's rows of what all ranks gathered."""
    if group is None:
        return gathered
    return gathered.chunk(dist.get_world_size(group))[dist.get_rank(group)]
