# SPDX-License-Identifier: Apache-2.0
"""Heads that FSDP2 or tensor parallelism has sharded, where TRL reads them outside their forward.

TRL takes ``weight.full_tensor()``, in whose backward every rank keeps its rows of its own gradient:
that of its tokens alone. What belongs there is the mean over the ranks, as FSDP2 takes it; where
they have the same tokens, under tensor parallelism, their gradients are one, and so is its mean.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial


def with_mean_gradient(value: Tensor | None) -> Tensor | None:
    """``value``, of TRL's head; where it was gathered from a sharded parameter, the gradient that
    it hands on is the mean over the ranks that have it."""
    parameter = None if value is None else _parameter_of(value)
    if value is None or parameter is None:
        return value
    mesh = parameter.device_mesh
    made = value.view_as(value)  # which scoring does not refuse, as it does full_tensor()
    made.register_hook(lambda gradient: _mean(gradient, mesh))
    return made


def gathered(value: Tensor | None) -> Tensor | None:
    """All of a sharded parameter, with that gradient; any other tensor as it is."""
    if not isinstance(value, DTensor):
        return value
    return value.full_tensor(grad_placements=[Partial("avg")] * value.device_mesh.ndim)


def _parameter_of(value: Tensor) -> DTensor | None:
    """The sharded parameter that ``value`` is all of."""
    node = value.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    found = getattr(node, "variable", None)
    return found if isinstance(found, DTensor) and found.shape == value.shape else None


def _mean(gradient: Tensor, mesh: DeviceMesh) -> Tensor:
    mean = gradient / mesh.size()
    for dimension in range(mesh.ndim):
        dist.all_reduce(mean, group=mesh.get_group(dimension))
    return mean
