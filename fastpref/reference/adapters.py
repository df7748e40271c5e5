# SPDX-License-Identifier: Apache-2.0
"""The weights of LoRA adapters, and of a model with its adapters merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .modules import bare


def is_peft_model(model: Any) -> bool:
    """Whether it is PEFT's model around another one."""
    return isinstance(model, nn.Module) and hasattr(model, "peft_config")


def adapter_tensors(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of one adapter, in an order that two adapters of one configuration share.

    For ``update_(adapter_tensors(model, "reference"), adapter_tensors(model, "default"), ...)``: a
    reference that is an adapter costs no second model. The average is that of the factors.

    Args:
        model: PEFT's model.
        name: of one of its adapters.
    """
    held = bare(model) if isinstance(model, nn.Module) else model
    return list(named_adapter(held, name).values())


def named_adapter(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """As ``adapter_tensors``, by names in which the adapter's own does not occur."""
    check_adapter(model, name)
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for layer in module.adapter_layer_names:
            try:
                wrapper: Any = module
                held = (
                    wrapper.get_submodule(layer) if "." in layer else getattr(wrapper, layer, None)
                )
            except AttributeError:
                continue
            if not isinstance(held, (nn.ModuleDict, nn.ParameterDict)) or name not in held:
                continue
            one = held[name]
            inside = {"": one} if isinstance(one, nn.Parameter) else dict(one.named_parameters())
            found |= {
                f"{path}.{layer}.{inner}".rstrip("."): value for inner, value in inside.items()
            }
    if not found:
        raise ValueError(f"name must be an adapter that has weights, got {name!r}, which has none")
    return found


def check_adapter(model: Any, name: Any, argument: str = "name") -> None:
    """That the model is PEFT's and has an adapter of this name."""
    if not is_peft_model(model):
        raise TypeError(
            f"model must be a peft.PeftModel, got {type(model).__name__}; make one with "
            "peft.get_peft_model"
        )
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be the name of an adapter, got {type(name).__name__}")
    if name not in model.peft_config:
        raise ValueError(
            f"{argument} must be one of the model's adapters, {', '.join(model.peft_config)}, got "
            f"{name!r}; model.add_adapter makes one"
        )


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """All weights under the names of the model without PEFT, with what the active LoRA adapters
    add: W + scale B A, in the wider dtype of both. The model is left as it is."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model()
    added: dict[str, Tensor] = {}
    outside: list[str] = []  # where the tensors of adapters lie
    for path, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(_cannot_merge(path, "is trained whole (modules_to_save)"))
        if not isinstance(module, LoraLayer):
            continue
        active = [one for one in module.active_adapters if one in module.scaling]
        if any(module.lora_variant.get(one) or module.lora_bias.get(one) for one in active):
            raise ValueError(_cannot_merge(path, "has DoRA or another variant of LoRA, or a bias"))
        outside += [f"{path}.{one}." for one in module.adapter_layer_names]
        if active and not module.merged:
            layer: Any = module
            deltas = [layer.get_delta_weight(one) for one in active]
            added[f"{path}.weight"] = torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]
    weights: dict[str, Tensor] = {}
    tensors = [*base.named_parameters(), *base.named_buffers()]
    for name, value in tensors:
        if name.startswith(tuple(outside)):
            continue
        plain = name.replace(".base_layer.", ".")
        weights[plain] = value + added.pop(plain) if plain in added else value
    if added:
        raise ValueError(_cannot_merge(next(iter(added)), "shares its weight with another layer"))
    return weights


def _cannot_merge(path: str, why: str) -> str:
    return (
        f"policy[{path}] {why}, which update_ does not merge into a whole model; keep the "
        "reference as a second adapter, or as a PEFT model like the policy"
    )
