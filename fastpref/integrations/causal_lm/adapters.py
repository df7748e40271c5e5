# SPDX-License-Identifier: Apache-2.0
"""PEFT's heads: LoRA on the output head, its trained copies, and trained tokens.

With several LoRA adapters active, head(x) = W x + b + sum_i s_i (B_i A_i x + b_i), which is one
update with A = [s_1 A_1; s_2 A_2; ...] and B = [B_1, B_2, ...] (Hu et al., arXiv:2106.09685).
Where an update sees other inputs than the weight, because of dropout, hidden states are widened by
its rows u = s A dropout(x), and the update is that of (x, u) by B alone. DoRA's row factors
m / ||W + s B A|| (Liu et al., arXiv:2402.09353) go into a weight that is made for the call.

PEFT is imported only where one of its modules is found.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .projection import Projection


def _is(module: nn.Module, path: str, name: str) -> bool:
    """Whether it is an instance of PEFT's class ``name`` in ``peft.path``."""
    if not any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
        return False
    return isinstance(module, getattr(importlib.import_module(f"peft.{path}"), name))


def unwrapped(module: Any) -> nn.Module:
    """The module that does the work of one of PEFT's wrappers; any other module itself."""
    if _is(module, "utils.other", "TrainableTokensWrapper"):
        return module.token_adapter  # type: ignore[no-any-return]
    if not _is(module, "utils.other", "ModulesToSaveWrapper"):
        return module  # type: ignore[no-any-return]
    active = module.active_adapters
    own = module.disable_adapters or not active
    own = own or any(name not in module.modules_to_save for name in active)
    found: nn.Module = module.original_module if own else module.modules_to_save[active[0]]
    return found


def base_layer(head: Any) -> nn.Module:
    """The module that owns the weight."""
    return base_layer(head.base_layer) if _is_adapter(head) else head


def _is_adapter(head: nn.Module) -> bool:
    return _is(head, "tuners.tuners_utils", "BaseTunerLayer")


def adapter_supported(head: Any) -> str | None:
    """Why ``project`` does not know the head, or None."""
    kind = f"a head of type {type(head).__module__}.{type(head).__name__}"
    if not _is_adapter(head) or type(head.base_layer).forward is not nn.Linear.forward:
        return f"{kind} is none that fastpref reads"
    if _is(head, "tuners.trainable_tokens.layer", "TrainableTokensLayer"):
        return None
    if not _is(head, "tuners.lora.layer", "Linear"):
        return f"{kind} is no LoRA"
    for name in _active(head):
        variant = head.lora_variant.get(name)
        if variant is None:
            continue
        if not _is_dora(variant):
            return f"{kind} has a variant of LoRA that fastpref does not read ({variant!r})"
        if len(_active(head)) > 1:
            return f"{kind} has DoRA beside another adapter"
        if _dropout(head, name) is not None:
            return f"{kind} has DoRA with dropout; set lora_dropout=0 for its head"
    return None


def project(head: Any, hidden: Tensor) -> tuple[Tensor, Projection]:
    """As ``head.project``, of a head that ``adapter_supported`` knows."""
    if head.disable_adapters and head.merged:
        head.unmerge()
    weight, bias = head.base_layer.weight, head.base_layer.bias
    if _is(head, "tuners.trainable_tokens.layer", "TrainableTokensLayer"):
        if head.disable_adapters or not head.active_adapters or head.merged:
            return hidden, Projection(weight, bias)
        # PEFT leaves a bias out here.
        return hidden, Projection(head.get_merged_weights(head.active_adapters), None)
    active = _active(head)
    if not active:
        return hidden, Projection(weight, bias)
    for name in active:
        extra = head.lora_B[name].bias
        if extra is not None:
            extra = extra * head.scaling[name]
            bias = extra if bias is None else bias + extra
    if any(name in head.lora_variant for name in active):
        return hidden, Projection(_dora_weight(head, active[0]), bias)
    if weight.requires_grad:
        # Trained beside its adapters: one dense gradient serves both.
        update = sum(
            head.scaling[one] * head.lora_B[one].weight @ head.lora_A[one].weight for one in active
        )
        return hidden, Projection(weight + update.to(weight.dtype), bias)
    b = torch.cat([head.lora_B[name].weight for name in active], dim=1)
    if any(_dropout(head, name) is not None for name in active):
        return _widened(head, hidden, active, weight, bias, b)
    a = torch.cat([head.lora_A[name].weight * head.scaling[name] for name in active])
    return hidden, Projection(weight, bias, (a, b, 1.0))


def _active(head: Any) -> list[str]:
    """Names of the adapters that take part."""
    if head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _dropout(head: Any, name: str) -> nn.Module | None:
    """That of an adapter, where it drops anything."""
    found: nn.Module = head.lora_dropout[name]
    return None if isinstance(found, nn.Identity) or not found.training else found


def _widened(
    head: Any, hidden: Tensor, active: list[str], weight: Tensor, bias: Tensor | None, b: Tensor
) -> tuple[Tensor, Projection]:
    parts = [hidden]
    for name in active:
        seen = head.lora_dropout[name](
            head._cast_input_dtype(hidden, head.lora_A[name].weight.dtype)
        )
        update = nn.functional.linear(seen, head.lora_A[name].weight) * head.scaling[name]
        parts.append(update.to(hidden.dtype))
    rank = b.shape[1]
    wide = torch.cat([weight, weight.new_zeros(weight.shape[0], rank)], dim=1)
    picks = torch.eye(rank, device=weight.device, dtype=weight.dtype)
    a = torch.cat([picks.new_zeros(rank, weight.shape[1]), picks], dim=1)
    return torch.cat(parts, dim=-1), Projection(wide, bias, (a, b, 1.0))


def _is_dora(variant: object) -> bool:
    found: type = importlib.import_module("peft.tuners.lora.variants").DoraLinearVariant
    return isinstance(variant, found)


def _dora_weight(head: Any, name: str) -> Tensor:
    """(V, H); the norms of rows count as constants, as published."""
    update = head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
    weight = head.base_layer.weight + update.to(head.base_layer.weight.dtype)
    factors = head.lora_magnitude_vector[name].weight
    # In sixteen bits, a factor would put its rounding on a whole row.
    precise = torch.promote_types(factors.dtype, torch.promote_types(weight.dtype, torch.float32))
    factors = factors / torch.linalg.vector_norm(weight.detach(), dim=1, dtype=precise)
    made: Tensor = (factors[:, None] * weight).to(weight.dtype)
    return made
