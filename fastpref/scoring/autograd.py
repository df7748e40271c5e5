# SPDX-License-Identifier: Apache-2.0
"""The autograd node of scoring: hidden and the head's parameters in, per-token scores out, any
upstream gradient back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import canary, lora, vocab_parallel
from .backward import Gradients, Upstream, backward
from .forward import Kept, Run, forward
from .reductions import full_precision_reductions
from .request import Call, Parameters
from .retry import with_less
from .schedule import Plan, less
from .types import DIFFERENTIABLE, OUTPUTS, Head, TokenScores, statistics_dtype

SECOND_DERIVATIVE = (
    "fastpref's fused head has no second derivative; where one is needed, score with plain torch: "
    "(hidden @ weight.T).log_softmax(-1)"
)


def score(call: Call, hidden: Tensor, parameters: Parameters) -> TokenScores:
    return TokenScores._make(LinearScores.apply(call, hidden, *parameters))  # type: ignore[no-untyped-call]


class LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, hidden: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # An output nobody differentiates must not cost a gradient of zeros.
        ctx.set_materialize_grads(False)
        scores, kept, head, plan = run_forward(call, hidden.detach(), _detached(parameters))
        if call.request.needs_grad:
            # A saved tensor goes with the graph; an attribute would stay as long as the outputs.
            ctx.save_for_backward(hidden, *parameters, kept.exps)
            ctx.kept, ctx.call = replace(kept, exps=None), replace(call, plan=plan)
            copied = call.plan.copies_weight and call.request.weight_context is None
            ctx.head = head if copied else None
        ctx.mark_non_differentiable(
            *(
                value
                for name, value in zip(OUTPUTS, scores, strict=True)
                if value is not None and name not in DIFFERENTIABLE
            )
        )
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, *parameters, exps = ctx.saved_tensors
        # Without rows, where an earlier backward has given them back.
        kept = replace(ctx.kept, exps=exps)
        with torch.no_grad():
            gradients = run_backward(
                ctx.call, hidden, Parameters(*parameters), kept, upstream, ctx.head
            )
        return (None, *once_differentiable(gradients, (hidden, *parameters, *upstream)))


class Scored(NamedTuple):
    """Of a forward pass."""

    scores: TokenScores  # like the target
    kept: Kept
    head: Head  # in the products' dtype
    plan: Plan  # that memory held


def run_forward(call: Call, hidden: Tensor, parameters: Parameters) -> Scored:
    """Scores, and what backward needs; with less than planned where memory runs out."""

    def attempt(plan: Plan) -> Scored:
        head = call.head(parameters)
        rows = packed_rows(call, hidden, parameters)
        target = call.packing.gather(call.target.reshape(-1))
        run = Run(head, plan, call.backend, call.request.group, call.mean_row(head))
        scores, kept = forward(run, rows, target, call.request.outputs)
        canary.watch(call, head, rows, target, scores.logp)
        spread = (None if value is None else _unpacked(value, call) for value in scores)
        return Scored(TokenScores._make(spread), kept, head, plan)

    with products_of(hidden):
        return with_less(attempt, call.plan, less, hidden.device, call.request.group)


def run_backward(
    call: Call,
    hidden: Tensor,
    parameters: Parameters,
    kept: Kept,
    upstream: Sequence[Tensor | None],
    head: Head | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients at hidden and at each of the parameters; None where none is needed. Where memory
    runs out the exponentials in ``kept`` are given back and their rows recomputed.

    ``upstream`` are gradients at the fields of TokenScores.
    """
    context = (
        nullcontext()
        if call.request.weight_context is None
        else (call.request.weight_context(parameters.weight, parameters.bias))
    )

    def attempt(plan: Plan) -> tuple[Tensor | None, ...]:
        rows = packed_rows(call, hidden, parameters)
        run = Run(head or call.head(parameters), plan, call.backend, call.request.group)
        trained = parameters.weight if parameters.lora_b is None else parameters.lora_b
        gradients = backward(run, rows, kept, _packed_upstream(upstream, call), trained.dtype)
        d_hidden = d_a = None
        if gradients.hidden is not None:
            d_rows, d_a = row_gradients(call, gradients.hidden, rows, parameters)
            d_hidden = call.packing.spread(d_rows).view(hidden.shape).to(hidden.dtype)
        found = by_parameter(gradients, d_a, parameters)
        return d_hidden, *like_parameters(found, parameters)

    def recomputing(plan: Plan) -> Plan | None:
        kept.give_back()
        return None if kept.direct is not None else less(plan, keep=False)

    with context, products_of(hidden):
        return with_less(attempt, call.plan, recomputing, hidden.device, call.request.group)


def row_gradients(
    call: Call, gradient: Tensor, rows: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor | None]:
    """The gradient at wide ``rows`` -> at hidden's rows, and at the update's A."""
    gradient = vocab_parallel.sum_over_ranks(gradient, call.request.group)
    return lora.narrow_gradient(gradient, rows, parameters.lora_a, call.request.lora_scale)


def by_parameter(
    gradients: Gradients, d_a: Tensor | None, parameters: Parameters
) -> tuple[Tensor | None, ...]:
    """In the order of ``Parameters``, 0 in rows beyond those in use."""
    weight, bias, _, b = parameters
    d_bias = _padded(gradients.bias, bias)
    if b is None:
        return _padded(gradients.weight, weight), d_bias, None, None
    return None, d_bias, d_a, _padded(gradients.weight, b)


def like_parameters(
    gradients: Sequence[Tensor | None], parameters: Parameters
) -> tuple[Tensor | None, ...]:
    """In the dtype of each."""
    pairs = zip(gradients, parameters, strict=True)
    return tuple(None if one is None or own is None else one.to(own.dtype) for one, own in pairs)


def once_differentiable(
    gradients: Sequence[Tensor | None], depends_on: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients; under create_graph such that their own derivatives raise."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    # torch's once_differentiable looks at upstream gradients only, and would let these pass for
    # constants where those are.
    return tuple(
        None if one is None else _OnceDifferentiable.apply(one, *depends_on)  # type: ignore[no-untyped-call]
        for one in gradients
    )


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient whose own derivative, by any of ``depends_on``, raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(SECOND_DERIVATIVE)


def on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


@contextlib.contextmanager
def products_of(tensor: Tensor) -> Iterator[None]:
    """On the device of ``tensor``, where Triton launches, in the dtypes given, with sums that are
    not rounded on the way."""
    with contextlib.ExitStack() as stack:
        if on_cuda(tensor):
            stack.enter_context(torch.cuda.device(tensor.device))
            stack.enter_context(full_precision_reductions())
        stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
        yield


def packed_rows(call: Call, hidden: Tensor, parameters: Parameters) -> Tensor:
    """The scored rows in the products' dtype, widened by an update of the weight."""
    rows = call.packing.gather(hidden.reshape(-1, hidden.shape[-1])).to(call.plan.dtype)
    return lora.widen(rows, parameters.lora_a, call.request.lora_scale)


def _detached(parameters: Sequence[Tensor | None]) -> Parameters:
    return Parameters._make(None if one is None else one.detach() for one in parameters)


def _unpacked(values: Tensor, call: Call) -> Tensor:
    packing, shape = call.packing, call.target.shape
    spread = packing.spread(values)
    if packing.positions is None and packing.valid is not None and spread.shape == shape:
        return spread  # made just now
    # A copy: the caller may change it, and backward reads the original; autograd refuses in-place
    # changes of a view among several outputs.
    return values.new_empty(shape).copy_(spread.view(shape))


def _packed_upstream(upstream: Sequence[Tensor | None], call: Call) -> Upstream:
    dtype = statistics_dtype(call.plan.dtype)
    by_name = dict(zip(OUTPUTS, upstream, strict=True))
    return Upstream(
        *(
            None if value is None else call.packing.gather(value.reshape(-1).to(dtype)).contiguous()
            for value in (by_name["logp"], by_name["entropy"], by_name["lse"])
        )
    )


def _padded(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient of the rows in use, 0 in rows beyond them."""
    if gradient is None or like is None:
        return None
    if gradient.shape[0] == like.shape[0]:
        return gradient
    padded = gradient.new_zeros(like.shape)
    padded[: gradient.shape[0]] = gradient
    return padded
