# SPDX-License-Identifier: Apache-2.0
"""What is left of a sharded parameter outside its module's forward, where a functional call would
find nothing in it, or give it a gradient that is silently wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

# Of others, fake and sharded ones among them, the type says more.
PLAIN = frozenset({Tensor, Parameter})

_REMEDY = (
    "run the loss inside the forward of the module that owns it, as fastpref.fuse_lm_head does; "
    "for a vocabulary-sharded head pass the local shard with tp_group"
)


def is_whole(tensor: Tensor) -> bool:
    """Of one whose type is among ``PLAIN``: whether it has memory, which FSDP frees under the views
    of a flat parameter, and is not ``full_tensor()`` of a sharded one, in whose backward every rank
    keeps its rows of its own gradient."""
    return not _is_freed(tensor) and (tensor.grad_fn is None or not _is_gathered(tensor))


def _is_freed(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return not tensor.untyped_storage().nbytes() and tensor.numel() > 0


def _is_gathered(tensor: Tensor) -> bool:
    """Whether nobody said what becomes of its gradient."""
    node = tensor.grad_fn
    while type(node).__name__ == "ToCopyBackward0":  # a cast
        node = node.next_functions[0][0]  # type: ignore[union-attr]
    if node is None or type(node).__name__ != "_ToTorchTensorBackward":
        return False
    unsaid = getattr(node, "grad_placements", ()) is None
    return unsaid and "Redistribute" in str(node.next_functions)  # to_local() has none before it


def check_whole(name: str, tensor: Tensor, matrix: bool = True) -> None:
    """Raise ValueError unless a parameter holds all that a call takes of it; ``matrix`` is False of
    a bias."""
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            f"{name} must be a plain tensor, got a DTensor (sharded parameter); {_REMEDY}"
        )
    if getattr(tensor, "ds_status", None) is not None and tensor.numel() == 0:
        raise ValueError(
            f"{name} must be whole, got a partitioned ZeRO-3 parameter without data; {_REMEDY}; or "
            "pass a weight_context that gathers it (deepspeed.zero.GatheredParameters)"
        )
    if matrix and getattr(tensor, "_fsdp_flattened", False) and tensor.dim() < 2:
        raise ValueError(
            f"{name} must be whole, got {tuple(tensor.shape)}, this rank's part of a parameter "
            f"that FSDP has flattened; {_REMEDY}"
        )
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or type(tensor) not in PLAIN:
        return
    if _is_freed(tensor):
        raise ValueError(
            f"{name} must be whole, got {tuple(tensor.shape)} whose memory FSDP has freed; "
            f"{_REMEDY}"
        )
    if _is_gathered(tensor):
        raise ValueError(
            f"{name} must be a plain tensor, got full_tensor() of a DTensor (sharded parameter), "
            "whose gradient would be each rank's own; say what becomes of it, "
            'full_tensor(grad_placements=[Partial("avg")]) where ranks have different tokens, '
            f"[Replicate()] where they have the same; or {_REMEDY}"
        )
