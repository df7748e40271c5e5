# SPDX-License-Identifier: Apache-2.0
"""The autograd node of logits of chosen vocabulary ids, which torch.func and is_grads_batched can
batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..head import Model
from ..transforms import SECOND_DERIVATIVE, Differentiable
from . import operators
from .passes import ChosenCall, run_backward, run_forward


def run(call: ChosenCall, model: Model, ids: Tensor) -> Tensor:
    """(..., K) logits in the statistics' dtype; 0 at positions that are not scored."""
    logits: Tensor
    logits, _ = _Logits.apply(call, ids, *model.tensors)  # type: ignore[no-untyped-call]
    return logits


class _Logits(Differentiable):
    """Of a call, ids and the tensors of a model."""

    @staticmethod
    def forward(call: ChosenCall, ids: Tensor, *tensors: Tensor | None) -> Any:
        return run_forward(call, Model.of(tensors, call.form), ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, ids, *tensors = inputs
        _, raw = output
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(ids, raw, *tensors)
        if raw is not None:
            ctx.mark_non_differentiable(raw)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        needed = tuple(ctx.needs_input_grad[2:])
        if upstream is None:
            return (None, None, *[None] * len(needed))
        ids, raw, *tensors = ctx.saved_tensors
        if is_legacy_batchedtensor(upstream):
            # Of is_grads_batched, which batches operators alone.
            model = Model.of(tensors, ctx.call.form)
            return (None, None, *operators.gradients(ctx.call, model, ids, raw, upstream))
        found = _Gradients.apply(ctx.call, needed, upstream, ids, raw, *tensors)  # type: ignore[no-untyped-call]
        return (None, None, *found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _one_by_one(_Logits, info.batch_size, in_dims, inputs)


class _Gradients(torch.autograd.Function):
    """At the tensors of a model; an operation of its own, so that it can be batched."""

    @staticmethod
    def forward(
        call: ChosenCall,
        needed: tuple[bool, ...],
        upstream: Tensor,
        ids: Tensor,
        raw: Tensor | None,
        *tensors: Tensor | None,
    ) -> Any:
        return run_backward(call, Model.of(tensors, call.form), ids, raw, upstream, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        raise RuntimeError(SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _one_by_one(_Gradients, info.batch_size, in_dims, inputs)


def _one_by_one(
    function: Any, size: int, in_dims: Sequence[Any], inputs: Sequence[Any]
) -> tuple[Any, Any]:
    """``function`` of each of a batch of inputs, and the dimensions of the batch in the results."""
    found = []
    for at in range(size):
        pairs = zip(inputs, in_dims, strict=True)
        own = [one.select(dim, at) if isinstance(dim, int) else one for one, dim in pairs]
        found.append(function.apply(*own))
    joined = tuple(None if one[0] is None else torch.stack(one) for one in zip(*found, strict=True))
    return joined, tuple(None if one is None else 0 for one in joined)
