# SPDX-License-Identifier: Apache-2.0
"""Heads whose tensors are DTensors over the ranks of ``tp_group``: each rank's own part of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def local_parts(
    hidden: Any, weight: Any, head: Mapping[str, Any], prefix: str = ""
) -> tuple[Any, Any, dict[str, Any]]:
    """``hidden``, ``weight``, and what else makes a head, with plain tensors. What is not a DTensor
    stays as it is. Gradients arrive at DTensors of the same placements.

    Raises:
        ValueError: a DTensor of another mesh, or of other placements, or of no group.
    """
    group, own = head.get("tp_group"), dict(head)
    if not isinstance(group, dist.ProcessGroup):
        return hidden, weight, own  # a DTensor is refused elsewhere
    # It takes as long to import as all of fastpref.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    rows, whole = Shard(0), Replicate()

    def local(tensor: Any, placed: Placement, name: str) -> Any:
        sharded = isinstance(tensor, DTensor)
        return _local(tensor, group, placed, f"{prefix}{name}") if sharded else tensor

    if isinstance(weight, DTensor) and own.get("vocab_range") is None:
        own["vocab_range"] = _rows_of_rank(weight)
    weight, hidden = local(weight, rows, "weight"), local(hidden, whole, "hidden")
    if "bias" in own:
        own["bias"] = local(own["bias"], rows, "bias")
    lora = own.get("lora")
    if isinstance(lora, (tuple, list)) and len(lora) == 3:
        a, b, scale = lora
        own["lora"] = local(a, whole, "lora's A"), local(b, rows, "lora's B"), scale
    return hidden, weight, own


def _rows_of_rank(weight: DTensor) -> tuple[int, int]:
    """As DTensor shares rows out: the first ranks hold as many as any."""
    mesh, total = weight.device_mesh, weight.shape[0]
    each = -(-total // mesh.size())
    start = min(total, mesh.get_local_rank() * each) if mesh.ndim == 1 else 0
    return start, min(total, start + each)


def _local(tensor: DTensor, group: dist.ProcessGroup, expected: Placement, name: str) -> Tensor:
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
            f"({'0' if expected.is_shard() else ''})]) makes it so"
        )
    local: Tensor = tensor.to_local()
    return local
