# SPDX-License-Identifier: Apache-2.0
"""The one autograd node of scoring: hidden, weight and bias in, per-token scores out, any upstream
gradient back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends, vocab_parallel
from .backward import Upstream, backward
from .forward import Kept, Run, forward
from .packing import Packing
from .schedule import Plan
from .types import DIFFERENTIABLE, OUTPUTS, Head, LogitMap, TokenScores, statistics_dtype

# Entered around every use of weight and bias in backward: ZeRO-3 gathers partitioned parameters
# here.
WeightContext = Callable[[Tensor, Tensor | None], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """What one call knows beside its differentiable inputs."""

    target: Tensor  # like hidden without its last dimension
    packing: Packing
    plan: Plan
    map: LogitMap
    outputs: tuple[str, ...]
    start: int  # first vocabulary id of the weight
    columns: int  # rows of the weight in use
    vocab_size: int
    group: dist.ProcessGroup | None = None
    weight_context: WeightContext | None = None

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        dtype = self.plan.dtype
        if bias is not None:
            bias = bias[: self.columns].to(statistics_dtype(dtype)).contiguous()
        return Head(weight[: self.columns].to(dtype), bias, self.map, self.start, self.vocab_size)


def score(call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenScores:
    return TokenScores._make(LinearScores.apply(hidden, weight, bias, call))  # type: ignore[no-untyped-call]


class LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> tuple[Tensor | None, ...]:
        # An output nobody differentiates must not cost a gradient of zeros.
        ctx.set_materialize_grads(False)
        plan, packing = call.plan, call.packing
        with _on_device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
            head = call.head(weight.detach(), None if bias is None else bias.detach())
            rows = _packed_hidden(hidden.detach(), call)
            target = packing.gather(call.target.reshape(-1))
            run = Run(head, plan, backends.load(plan.backend), call.group)
            scores, kept = forward(run, rows, target, call.outputs)
            spread = [None if value is None else _unpacked(value, call) for value in scores]
        if plan.needs_hidden or plan.needs_weight or plan.needs_bias:
            # A saved tensor goes with the graph; an attribute would stay as long as the outputs.
            ctx.save_for_backward(hidden, weight, bias, kept.exps)
            ctx.kept, ctx.call = replace(kept, exps=None), call
            cast_once = call.weight_context is None and head.weight.dtype != weight.dtype
            ctx.cast_head = head if cast_once else None
        ctx.mark_non_differentiable(
            *(
                value
                for name, value in zip(OUTPUTS, spread, strict=True)
                if value is not None and name not in DIFFERENTIABLE
            )
        )
        return tuple(spread)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, exps = ctx.saved_tensors
        kept = replace(ctx.kept, exps=exps)
        with torch.no_grad():
            gradients = LinearScores._gradients(ctx, kept, upstream, *saved)
        if not torch.is_grad_enabled():
            return (*gradients, None)
        # Under create_graph; torch's once_differentiable looks at upstream gradients only, and
        # would let these pass for constants where those are.
        once = [
            None if one is None else _OnceDifferentiable.apply(one, *saved, *upstream)  # type: ignore[no-untyped-call]
            for one in gradients
        ]
        return (*once, None)

    @staticmethod
    def _gradients(
        ctx: Any,
        kept: Kept,
        upstream: tuple[Tensor | None, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        call: Call = ctx.call
        packing, plan = call.packing, call.plan
        context = (
            nullcontext() if call.weight_context is None else call.weight_context(weight, bias)
        )
        off = torch.autocast(hidden.device.type, enabled=False)
        with _on_device_of(hidden), context, off:
            head = ctx.cast_head or call.head(weight, bias)
            rows = _packed_hidden(hidden, call)
            run = Run(head, plan, backends.load(plan.backend), call.group)
            gradients = backward(run, rows, kept, _packed_upstream(upstream, call))
            d_hidden = d_weight = d_bias = None
            if gradients.hidden is not None:
                d_rows = vocab_parallel.sum_over_ranks(gradients.hidden, call.group)
                d_hidden = packing.spread(d_rows).view(hidden.shape).to(hidden.dtype)
            if gradients.weight is not None:
                d_weight = _padded(gradients.weight, weight)
            if gradients.bias is not None and bias is not None:
                d_bias = _padded(gradients.bias, bias)
        return d_hidden, d_weight, d_bias


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient whose own derivative, by any of ``depends_on``, raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "fastpref.linear_logprob has no second derivative; where one is needed, score with "
            "plain torch: (hidden @ weight.T).log_softmax(-1)"
        )


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments' is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _packed_hidden(hidden: Tensor, call: Call) -> Tensor:
    return call.packing.gather(hidden.reshape(-1, hidden.shape[-1])).to(call.plan.dtype)


def _unpacked(values: Tensor, call: Call) -> Tensor:
    # A copy: the caller may change it, and backward reads the original; autograd refuses in-place
    # changes of a view among several outputs.
    return values.new_empty(call.target.shape).copy_(
        call.packing.spread(values).view(call.target.shape)
    )


def _packed_upstream(upstream: tuple[Tensor | None, ...], call: Call) -> Upstream:
    dtype = statistics_dtype(call.plan.dtype)
    by_name = dict(zip(OUTPUTS, upstream, strict=True))
    return Upstream(
        *(
            None if value is None else call.packing.gather(value.reshape(-1).to(dtype)).contiguous()
            for value in (by_name["logp"], by_name["entropy"], by_name["lse"])
        )
    )


def _padded(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of the rows in use, 0 in rows beyond them."""
    gradient = gradient.to(like.dtype)
    if gradient.shape[0] == like.shape[0]:
        return gradient
    padded = torch.zeros_like(like)
    padded[: gradient.shape[0]] = gradient
    return padded
