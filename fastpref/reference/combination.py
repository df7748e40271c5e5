# SPDX-License-Identifier: Apache-2.0
"""One adapter that is the weighted sum of others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..objectives.checks import is_number
from .adapters import adapter_tensors, check_adapter


def combine_adapters(
    model: Any, names: Sequence[str], weights: Sequence[float], new_name: str
) -> None:
    """Add an adapter whose update is the weighted sum of those of others, exactly.

        B A scale (new) = sum_i weights_i scale_i B_i A_i

    The combination of COFS-DPO (Qi et al. 2024, arXiv:2406.05534), of the fast adapters of several
    domains; its rank is the sum of theirs. How the paper chooses the weights was not confirmed at
    the source: try some on a few remembered pairs of each domain (examples/ofs_dpo.py). Averaging
    factors, as PEFT's "linear" does, is another thing: it has cross terms B_i A_j.

    The new adapter is neither active nor trained; ``model.set_adapter`` does both. Under FSDP2 call
    it on all ranks: each gets the new adapter whole. FSDP2 would not reduce its gradients, and it
    raises where it gets one: to train it, combine before ``fully_shard``.

    Args:
        model: PEFT's model, of LoRA adapters without DoRA, biases and modules trained whole.
        names: of at least two adapters.
        weights: one finite number each, of either sign.
        new_name: of no adapter yet.
    """
    for argument, given in (("names", names), ("weights", weights)):
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"{argument} must be a list, got {type(given).__name__}")
    names, weights = list(names), list(weights)
    for name in names:
        check_adapter(model, name, "names")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"names must be at least two adapters, each once, got {names}")
    if len(weights) != len(names):
        raise ValueError(f"weights must be one for each of {len(names)} names, got {len(weights)}")
    for one in weights:
        if not is_number(one):
            raise TypeError(f"weights must be numbers, got {type(one).__name__}")
        if not math.isfinite(one):
            raise ValueError(f"weights must be finite, got {one!r}")
    if not isinstance(new_name, str) or not new_name:
        raise TypeError(f"new_name must be a name, got {new_name!r}")
    if "." in new_name:
        raise ValueError(f"new_name must have no '.', as it names modules, got {new_name!r}")
    if new_name in model.peft_config:
        raise ValueError(
            f"new_name must be of no adapter yet, got {new_name!r}; model.delete_adapter removes it"
        )
    for name in names:
        _check_configuration(name, model.peft_config[name])
    weights = [float(one) for one in weights]
    with _gathered(model, names) as sharded:
        model.add_weighted_adapter(names, weights, new_name, combination_type="cat")
    if sharded:
        _refuse_gradients(model, new_name)
    model.set_requires_grad(new_name, False)


@contextlib.contextmanager
def _gathered(model: nn.Module, names: Iterable[str]) -> Iterator[bool]:
    """These adapters are whole on every rank meanwhile, in the dtype of their shards; whether they
    have any."""
    weights = {id(one) for name in names for one in adapter_tensors(model, name)}
    shards: list[tuple[nn.Module, str, Any]] = [
        (module, name, one)
        for module in model.modules()
        for name, one in module.named_parameters(recurse=False)
        if id(one) in weights and isinstance(one, DTensor)
    ]
    try:
        for module, name, one in shards:
            setattr(module, name, nn.Parameter(one.detach().full_tensor(), requires_grad=False))
        yield bool(shards)
    finally:
        for module, name, one in shards:
            setattr(module, name, one)


def _refuse_gradients(model: nn.Module, name: str) -> None:
    def refuse(_: Tensor) -> None:
        raise ValueError(
            f"adapter {name!r} must not be trained, as combine_adapters made it of shards and "
            "FSDP2 does not reduce its gradients; call combine_adapters before fully_shard"
        )

    for one in adapter_tensors(model, name):
        one.requires_grad_(True).register_hook(refuse)  # which stays when they are frozen


def _check_configuration(name: str, configuration: Any) -> None:
    if "LORA" not in str(configuration.peft_type).upper():
        kind = configuration.peft_type
        raise ValueError(f"names must be LoRA adapters, got {name!r}, which is {kind}")
    for option, plain in (("use_dora", False), ("bias", "none"), ("lora_bias", False)):
        if getattr(configuration, option, plain) != plain:
            raise ValueError(
                f"names must be adapters of plain LoRA, got {name!r} with {option}="
                f"{getattr(configuration, option)!r}, of which a sum is none"
            )
    if configuration.modules_to_save:
        raise ValueError(
            f"names must be adapters of plain LoRA, got {name!r} with modules_to_save="
            f"{configuration.modules_to_save}, which a sum of adapters leaves out"
        )
