# SPDX-License-Identifier: Apache-2.0
"""Heads whose tensors are DTensors over the ranks of ``tp_group``: each rank's own part of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

ROWS, WHOLE = Shard(0), Replicate()


def local_parts(
    hidden: Any, weight: Any, head: Mapping[str, Any], prefix: str = ""
) -> tuple[Any, Any, dict[str, Any]]:
    """``hidden``, ``weight``, and what else makes a head, with plain tensors. What is not a DTensor
    stays as it is. Gradients arrive at DTensors of the same placements.

    Raises:
        ValueError: a DTensor of another mesh, or of other placements, or of no group.
    """
    group, own = head.get("tp_group"), dict(head)
    if isinstance(weight, DTensor) and isinstance(group, dist.ProcessGroup):
        if own.get("vocab_range") is None:
            own["vocab_range"] = _rows_of_rank(weight)
        weight = _local(weight, group, ROWS, f"{prefix}weight")
    hidden = _local(hidden, group, WHOLE, f"{prefix}hidden")
    if "bias" in own:
        own["bias"] = _local(own["bias"], group, ROWS, f"{prefix}bias")
    lora = own.get("lora")
    if isinstance(lora, (tuple, list)) and len(lora) == 3:
        a, b, scale = lora
        a = _local(a, group, WHOLE, f"{prefix}lora's A")
        own["lora"] = a, _local(b, group, ROWS, f"{prefix}lora's B"), scale
    return hidden, weight, own


def _rows_of_rank(weight: DTensor) -> tuple[int, int]:
    """As DTensor shares rows out: the first ranks hold as many as any."""
    mesh, total = weight.device_mesh, weight.shape[0]
    each = -(-total // mesh.size())
    start = min(total, mesh.get_local_rank() * each) if mesh.ndim == 1 else 0
    return start, min(total, start + each)


def _local(tensor: Any, group: Any, expected: Placement, name: str) -> Any:
    if not isinstance(tensor, DTensor) or not isinstance(group, dist.ProcessGroup):
        return tensor  # refused elsewhere
    mesh = tensor.device_mesh
    ranks = dist.get_process_group_ranks(group)
    if mesh.ndim != 1 or mesh.mesh.tolist() != ranks:
        raise ValueError(
            f"{name} is a DTensor over the mesh {mesh.mesh.tolist()}, expected one over the ranks "
            f"{ranks} of tp_group; pass the group of its mesh, mesh.get_group(), or the "
            "to_local() of a head that is sharded over one dimension of it alone"
        )
    if tensor.placements != (expected,):
        raise ValueError(
            f"{name} is a DTensor placed {tensor.placements}, expected ({expected!r},) under "
            f"tp_group; {name}.redistribute(placements=[{type(expected).__name__}"
            f"({'0' if expected == ROWS else ''})]) makes it so"
        )
    local: Tensor = tensor.to_local()
    return local
