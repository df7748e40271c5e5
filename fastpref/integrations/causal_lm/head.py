# SPDX-License-Identifier: Apache-2.0
"""The output head of a model: which module multiplies by the vocabulary, and by what."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ...scoring import WeightContext
from . import adapters
from .projection import Projection, Shards

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ShardedHeadError(RuntimeError):
    """A head that does not hold its weight where it is needed."""


class Head(NamedTuple):
    """A module that projects onto the vocabulary."""

    outer: nn.Module  # as the model calls it
    inner: nn.Module  # within what PEFT and FSDP have wrapped around it


def find_head(model: nn.Module) -> Head:
    """Looked up anew at every call, as PEFT and FSDP replace modules.

    Raises:
        ValueError: the model has none, or its weight is quantised.
    """
    found = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"model has no output head: {type(model).__name__}.get_output_embeddings() is "
            f"{type(found).__name__}, expected a module. Load a class with a language modelling "
            "head, such as AutoModelForCausalLM"
        )
    head = _unwrapped(found)
    base = adapters.base_layer(head)
    kind = _quantised(base)
    if kind is not None:
        raise ValueError(
            f"the output head of {type(model).__name__} is quantised ({kind}); expected a weight "
            "in float32, bfloat16, float16 or float64. Dequantise it, or exempt it from "
            'quantisation (llm_int8_skip_modules=["lm_head"] for bitsandbytes)'
        )
    return Head(found, head)


def _unwrapped(module: nn.Module) -> nn.Module:
    within = adapters.unwrapped(getattr(module, "_fsdp_wrapped_module", module))
    return module if within is module else _unwrapped(within)


def _quantised(base: nn.Module) -> str | None:
    """What a weight is that products cannot take as it is."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return type(base).__name__ if hasattr(base, "qweight") else None
    known = (Tensor, nn.Parameter, DTensor)
    if weight.dtype in FLOATS and (type(weight) in known or type(weight.data) in known):
        return None
    return f"{weight.dtype} {type(weight).__name__}"


def head_supported(head: nn.Module) -> str | None:
    """Why ``project`` does not know the head, or None."""
    if type(head).forward is nn.Linear.forward:
        return None
    return adapters.adapter_supported(head)


def columns(head: nn.Module) -> int | None:
    """Of the vocabulary, as far as the head has a weight that says so."""
    weight = getattr(adapters.base_layer(head), "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def project(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Projection]:
    """Hidden states on the head's device, widened where an adapter needs that, and what they are
    multiplied by. To be called within the head's forward, where its parameters are whole, or,
    under tensor parallelism, rows of each rank.

    Raises:
        ShardedHeadError: the weight is a shard of another kind.
    """
    weight: Tensor = adapters.base_layer(head).weight  # type: ignore[assignment]
    plain = type(head).forward is nn.Linear.forward
    if isinstance(weight, DTensor):
        return hidden, _rows_of_rank(head, weight, plain and not isinstance(hidden, DTensor))
    hidden = hidden.to(weight.device)
    if plain:
        return hidden, Projection(weight, head.bias)  # type: ignore[arg-type]
    return adapters.project(head, hidden)


def _rows_of_rank(head: nn.Module, weight: DTensor, known: bool) -> Projection:
    # FSDP2 has whole parameters here: what is still a DTensor belongs to tensor parallelism, whose
    # ranks are given the same tokens.
    if not known or weight.placements != (Shard(0),):
        raise ShardedHeadError(
            f"the output head's weight is a DTensor {tuple(weight.shape)} {weight.placements} "
            "within the forward of its module; expected a whole weight, as FSDP2 provides it "
            "there, or rows of a linear layer's (Shard(0)) under tensor parallelism alone. Shard "
            "the module that owns it with fully_shard (tied embeddings with the root module), or "
            "leave the head out of tensor parallelism"
        )
    bias = head.bias
    local = bias.to_local() if isinstance(bias, DTensor) else bias
    # As DTensor shares rows out: the first ranks hold as many as any.
    mesh, total = weight.device_mesh, weight.shape[0]
    start = min(total, mesh.get_local_rank() * -(-total // mesh.size()))
    shards = Shards(mesh.get_group(), start, total)
    return Projection(weight.to_local(), local, shards=shards)  # type: ignore[arg-type]


def weight_context() -> WeightContext | None:
    """Under ZeRO-3 parameters are partitioned between a module's forward and its backward."""
    deepspeed = importlib.import_module("transformers.integrations.deepspeed")
    if not deepspeed.is_deepspeed_zero3_enabled():
        return None

    def context(weight: Tensor, bias: Tensor | None) -> contextlib.AbstractContextManager[Any]:
        # Where the module's own hooks hold it, to leave would partition it under their hands.
        if weight.numel():
            return contextlib.nullcontext()
        gathered: contextlib.AbstractContextManager[Any]
        gathered = importlib.import_module("deepspeed").zero.GatheredParameters(
            [one for one in (weight, bias) if one is not None]
        )
        return gathered

    return context
