# SPDX-License-Identifier: Apache-2.0
"""A reference that follows the policy: averages and copies of weights, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..objectives.checks import is_number
from .adapters import is_peft_model, merged_weights
from .modules import bare

Weights = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def update_(reference: Weights, policy: Weights, *, decay: float) -> None:
    """Move a reference towards the policy, in place.

        reference = decay reference + (1 - decay) policy

    The update of TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656), whose alpha is 1 - decay: its
    soft one at any decay, its hard one at 0, which copies bit by bit. DNO (arXiv:2404.03715), SPIN
    (arXiv:2401.01335) and Curry-DPO (arXiv:2403.07230) copy after each of their iterations. When to
    do so is the caller's, or that of ``ReferenceCallback``; the losses are those of any objective.

    Of modules, parameters are averaged, buffers and integers copied, by name; what stands around a
    module for DDP or torch.compile does not count. Where the policy is a PEFT model with LoRA and
    the reference is none, the policy's weights are taken with its active adapters merged, which
    changes nothing in it. (The average of two adapters' factors is not that of their products: keep
    a reference that shall be the exact average as a whole model.) Shards of FSDP2 are averaged
    where they lie.

    A 16-bit reference cannot take up updates below half a unit of its last place, which a decay
    near 1 makes: keep it in float32.

    Args:
        reference: module, mapping of names to tensors, or tensors in order (``adapter_tensors``).
        policy: the same, in any dtype.
        decay: in [0, 1).

    Raises:
        ValueError: names, numbers, shapes or shards differ, or both are the same. Nothing has been
            changed then.
    """
    check_decay(decay)
    reference, policy = (
        bare(one) if isinstance(one, nn.Module) else one for one in (reference, policy)
    )
    kept = named(reference, "reference")
    if isinstance(reference, nn.Module) and is_peft_model(policy) and not is_peft_model(reference):
        followed = merged_weights(policy)
    else:
        followed = named(policy, "policy", kept)
    pairs = _paired(kept, followed)
    copied = buffer_names(reference) if isinstance(reference, nn.Module) else frozenset()
    for name, (mine, theirs) in pairs.items():
        if decay == 0 or name in copied or not mine.is_floating_point():
            mine.copy_(theirs)
        else:
            mine.lerp_(theirs.to(device=mine.device, dtype=mine.dtype), 1 - decay)


def frozen_copy(model: Model) -> Model:
    """A copy without gradients, in evaluation mode: the reference of an iteration (DNO, SPIN,
    Curry-DPO). To be made before a model is sharded; later on ``update_(copy, model, decay=0.0)``
    renews it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    made = copy.deepcopy(model)
    return made.requires_grad_(False).eval()


def named(
    weights: Weights, argument: str, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors by name, or by number where they have none.

    Args:
        weights: a module as ``bare`` returns it, or tensors.
        argument: what ``weights`` are called in a message.
        like: of a module, the names that are looked for where one tensor has several.
    """
    if isinstance(weights, Tensor):
        raise TypeError(
            f"{argument} must be a module or several tensors, got one Tensor; put it in []"
        )
    if isinstance(weights, nn.Module):
        found: dict[str, Tensor] = dict(weights.named_parameters(remove_duplicate=False))
        found |= dict(weights.named_buffers(remove_duplicate=False))
        return _each_once(found) if like is None else _as_named_there(found, like)
    if isinstance(weights, Mapping):
        tensors = dict(weights)
    elif isinstance(weights, Iterable) and not isinstance(weights, str):
        tensors = {str(place): one for place, one in enumerate(weights)}
    else:
        raise TypeError(
            f"{argument} must be a module or several tensors, got {type(weights).__name__}"
        )
    for name, one in tensors.items():
        if not isinstance(one, Tensor):
            raise TypeError(f"{argument} must be tensors, got {type(one).__name__} for {name!r}")
    return tensors


def check_decay(decay: float) -> None:
    if not is_number(decay):
        raise TypeError(f"decay must be a number in [0, 1), got {type(decay).__name__}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), 0 to copy, got {decay!r}")


def _each_once(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    once = {}
    for name, one in found.items():
        if id(one) not in seen:
            seen.add(id(one))
            once[name] = one
    return once


def _as_named_there(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights may go by another of their names in the reference."""
    chosen = {name: found[name] for name in like if name in found}
    taken = {id(one) for one in chosen.values()}
    return chosen | {name: one for name, one in found.items() if id(one) not in taken}


def buffer_names(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in module.named_buffers(remove_duplicate=False))


def _paired(
    kept: Mapping[str, Tensor], followed: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Reference and policy of each name but what both share; all checked before any is changed."""
    if kept.keys() != followed.keys():
        mine, theirs = kept.keys() - followed.keys(), followed.keys() - kept.keys()
        raise ValueError(
            "reference must hold the weights that policy holds, got others; "
            f"only in the reference: {_some(mine)}; only in the policy: {_some(theirs)}. For a "
            "PEFT policy pass a whole model, a PEFT model with the same adapters, or "
            "adapter_tensors of two adapters"
        )
    pairs = {name: (kept[name], followed[name]) for name in kept}
    pairs = {name: (a, b) for name, (a, b) in pairs.items() if a is not b}
    if kept and not pairs:
        raise ValueError(
            "reference must be another model than policy, got the same tensors; take a "
            "frozen_copy of the policy before the training"
        )
    for name, (own, other) in pairs.items():
        _check_pair(name, own, other)
    return pairs


def _check_pair(name: str, mine: Tensor, theirs: Tensor) -> None:
    for whose, one in (("reference", mine), ("policy", theirs)):
        if hasattr(one, "ds_id"):
            raise ValueError(
                f"{whose}[{name}] is partitioned by ZeRO-3, which update_ cannot average; use "
                "FSDP2, or ZeRO-2"
            )
    if mine.shape != theirs.shape:
        raise ValueError(
            f"reference[{name}] must have the shape of policy[{name}], {tuple(theirs.shape)}, got "
            f"{tuple(mine.shape)}"
        )
    shards = [_shards(one) for one in (mine, theirs)]
    if shards[0] != shards[1]:
        raise ValueError(
            f"reference[{name}] must be sharded as policy[{name}] is, {shards[1]}, got "
            f"{shards[0]}; wrap both alike, with fully_shard on the same mesh"
        )


def _shards(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return "not sharded"
    return f"{tensor.placements} over {tensor.device_mesh}"


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return (
        ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or "-"
    )
