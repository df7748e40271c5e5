# SPDX-License-Identifier: Apache-2.0
"""Scoring as registered operators, which torch.compile traces without looking inside.

Forward and backward are one operator each. What lives between them are explicit tensors, whose
number of rows, that of the scored positions, is only known when they run; which schedule runs is
decided then too, from the same sizes on both sides. A tensor that is not there is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import SECOND_DERIVATIVE, run_backward, run_forward
from .forward import Kept
from .request import Parameters, Request, plan_target
from .rows import RowScores
from .types import DIFFERENTIABLE, OUTPUTS, TokenScores, statistics_dtype

MODEL = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b"
_KEPT = ("logp", "anchor", "norm", "log_norm", "scale", "entropy", "exps", "direct")
_UPSTREAM = ", ".join(f"Tensor? grad_{name}" for name in OUTPUTS)
INPUTS = 1 + len(Parameters._fields)  # of MODEL


def tensors(number: int) -> str:
    """The type of so many, in a schema."""
    return f"({', '.join(['Tensor'] * number)})"


def score(request: Request, hidden: Tensor, parameters: Parameters, target: Tensor) -> TokenScores:
    found = torch.ops.fastpref.linear_scores(hidden, *parameters, target, *request.settings)
    wanted = dict(zip(OUTPUTS, found, strict=False))
    return TokenScores(**{name: wanted[name] for name in request.outputs})


@torch.library.custom_op(
    "fastpref::linear_scores",
    mutates_args=(),
    schema=f"({MODEL}, Tensor target, {Request.SCHEMA}) -> {tensors(len(OUTPUTS) + len(_KEPT))}",
)
def _linear_scores(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, parameters = arguments[0], Parameters(*arguments[1:INPUTS])
    target, *settings = arguments[INPUTS:]
    call = plan_target(Request.of(settings), hidden, parameters, target, traced=True)
    scores, kept, head, _ = run_forward(call, hidden, parameters)
    # Of one storage, perhaps; what an operator returns must not share any.
    rows = [None if one is None else one.clone() for one in (*kept.rows, kept.scale, kept.entropy)]
    exps = head.weight.new_empty((0, head.weight.shape[0])) if kept.exps is None else kept.exps
    direct = head.weight.new_empty((0, head.weight.shape[1]))
    found = (*scores, *rows, exps, direct if kept.direct is None else kept.direct)
    return tuple(hidden.new_empty(0) if one is None else one for one in found)


@_linear_scores.register_fake
def _linear_scores_fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, parameters = arguments[0], Parameters(*arguments[1:INPUTS])
    target, *settings = arguments[INPUTS:]
    request, context = Request.of(settings), torch.library.get_ctx()
    exact = statistics_dtype(request.dtype)
    scored, kept, direct = (context.new_dynamic_size() for _ in range(3))

    def like_target(name: str) -> Tensor:
        dtype = torch.bool if name == "is_top1" else exact
        shape = target.shape if name in request.outputs else (0,)
        empty: Tensor = hidden.new_empty(shape, dtype=dtype)
        return empty

    rows = [hidden.new_empty(scored, dtype=exact) for _ in range(5)]
    entropy = hidden.new_empty(scored if "entropy" in request.outputs else 0, dtype=exact)
    columns = request.columns_of(parameters)
    exps = hidden.new_empty((kept, columns), dtype=request.dtype)
    direct_rows = hidden.new_empty((direct, parameters.inner_size), dtype=request.dtype)
    return (*map(like_target, OUTPUTS), *rows, entropy, exps, direct_rows)


@torch.library.custom_op(
    "fastpref::linear_scores_backward",
    mutates_args=(),
    schema=f"({MODEL}, Tensor target, {', '.join('Tensor kept_' + name for name in _KEPT)}, "
    f"{_UPSTREAM}, {Request.SCHEMA}) -> {tensors(INPUTS)}",
)
def _linear_scores_backward(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, parameters = arguments[0], Parameters(*arguments[1:INPUTS])
    target, *rest = arguments[INPUTS:]
    held, rest = rest[: len(_KEPT)], rest[len(_KEPT) :]
    upstream, settings = rest[: len(OUTPUTS)], rest[len(OUTPUTS) :]
    call = plan_target(Request.of(settings), hidden, parameters, target, traced=True)
    *rows, scale, entropy, exps, direct = held
    kept = Kept(
        call.packing.gather(call.target.reshape(-1)),
        RowScores(*rows),
        scale,
        entropy if entropy.numel() else None,
        # Not this function's to give back.
        exps.detach() if exps.shape[0] else None,
        direct if direct.shape[0] else None,
    )
    gradients = run_backward(call, hidden, parameters, kept, upstream)
    needed = call.request.needed(parameters)
    return tuple(
        one if need and one is not None else hidden.new_empty(0)
        for one, need in zip(gradients, needed, strict=True)
    )


@_linear_scores_backward.register_fake
def _linear_scores_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    settings = arguments[-len(Request.FIELDS) :]
    return gradients_like(Request.of(settings), arguments[:INPUTS])


def gradients_like(request: Request, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What the backward operator returns, uninitialised: a gradient for hidden and each of the
    parameters that needs one."""
    hidden, parameters = inputs[0], Parameters(*inputs[1:])  # type: ignore[arg-type]
    if hidden is None:
        raise TypeError("a model without hidden states")
    return tuple(
        torch.empty_like(one, memory_format=torch.contiguous_format)
        if need and one is not None
        else hidden.new_empty(0)
        for one, need in zip(inputs, request.needed(parameters), strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.settings = inputs[INPUTS + 1 :]
    ctx.save_for_backward(*inputs[: INPUTS + 1], *output[len(OUTPUTS) :])
    plain = [one for name, one in zip(OUTPUTS, output, strict=False) if name not in DIFFERENTIABLE]
    ctx.mark_non_differentiable(*plain, *output[len(OUTPUTS) :])


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    gradients = torch.ops.fastpref.linear_scores_backward(
        *ctx.saved_tensors, *upstream[: len(OUTPUTS)], *ctx.settings
    )
    request = Request.of(ctx.settings)
    parameters = Parameters(*ctx.saved_tensors[1:INPUTS])
    found = zip(gradients, request.needed(parameters), strict=True)
    return (*(one if need else None for one, need in found), None, *[None] * len(ctx.settings))


def refuse(ctx: Any, *upstream: Tensor) -> Any:
    raise RuntimeError(SECOND_DERIVATIVE)


torch.library.register_autograd("fastpref::linear_scores", _differentiate, setup_context=_save)
torch.library.register_autograd("fastpref::linear_scores_backward", refuse)
