# SPDX-License-Identifier: Apache-2.0
"""What is computed of two heads as registered operators, in the manner of operators.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .divergence_products import Call, flat, models, run_backward, run_forward
from .mixture import mixed_logprob
from .operators import INPUTS, MODEL, gradients_like, refuse, tensors
from .request import Request
from .two_heads import Model, Question
from .types import statistics_dtype


def _prefixed(schema: str, prefix: str) -> str:
    """With ``prefix`` before each name."""
    arguments = (one.rsplit(" ", 1) for one in schema.split(", "))
    return ", ".join(f"{kind} {prefix}{name}" for kind, name in arguments)


MODELS = ", ".join(_prefixed(MODEL, prefix) for prefix in ("student_", "teacher_"))
SETTINGS = ", ".join(_prefixed(Request.SCHEMA, prefix) for prefix in ("student_", "teacher_"))
_TENSORS = 2 * INPUTS + 1  # and the target
_FIELDS = len(Request.FIELDS)


def divergence(
    question: Question, student: Model, teacher: Model, divergence: str, beta: float
) -> Tensor:
    value: Tensor = torch.ops.fastpref.linear_divergence(
        *flat(student), *flat(teacher), question.target, *_settings(question), divergence, beta
    )[0]
    return value


def mixed(
    question: Question, student: Model, teacher: Model, target: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.fastpref.mixed_logprob(
        *flat(student), *flat(teacher), question.target, *_settings(question), target, epsilon
    )
    return found


def _settings(question: Question) -> tuple[Any, ...]:
    return (*question.student.settings, *question.teacher.settings)


def _question(target: Tensor, settings: tuple[Any, ...]) -> Question:
    return Question(Request.of(settings[:_FIELDS]), Request.of(settings[_FIELDS:]), target)


def _call(arguments: tuple[Any, ...]) -> tuple[Call, Model, Model]:
    """Of both models' tensors, the target, both requests, divergence and beta."""
    student, teacher = models(arguments[: 2 * INPUTS])
    question = _question(arguments[2 * INPUTS], arguments[_TENSORS : _TENSORS + 2 * _FIELDS])
    heads = question.heads(student, teacher, traced=True)
    return Call(heads, *arguments[_TENSORS + 2 * _FIELDS :]), student, teacher


@torch.library.custom_op(
    "fastpref::linear_divergence",
    mutates_args=(),
    schema=f"({MODELS}, Tensor target, {SETTINGS}, str divergence, float beta) -> {tensors(3)}",
)
def _linear_divergence(*arguments: Any) -> tuple[Tensor, ...]:
    call, student, teacher = _call(arguments)
    value, kept, direct, _ = run_forward(call, student, teacher)
    plan, hidden = call.heads.plan, student.hidden
    if kept is None:
        kept = hidden.new_empty((0, plan.vocab_size), dtype=plan.dtype)
    if direct is None:
        direct = hidden.new_empty((0, plan.hidden_size), dtype=plan.dtype)
    return value, kept, direct


@_linear_divergence.register_fake
def _linear_divergence_fake(*arguments: Any) -> tuple[Tensor, ...]:
    student, _ = models(arguments[: 2 * INPUTS])
    target, request = arguments[2 * INPUTS], Request.of(arguments[_TENSORS : _TENSORS + _FIELDS])
    context, hidden = torch.library.get_ctx(), student.hidden
    kept = context.new_dynamic_size(), request.columns_of(student.parameters)
    direct = context.new_dynamic_size(), student.parameters.inner_size
    return (
        hidden.new_empty(target.shape, dtype=statistics_dtype(request.dtype)),
        hidden.new_empty(kept, dtype=request.dtype),
        hidden.new_empty(direct, dtype=request.dtype),
    )


@torch.library.custom_op(
    "fastpref::linear_divergence_backward",
    mutates_args=(),
    schema=f"({MODELS}, Tensor target, {SETTINGS}, str divergence, float beta, Tensor kept, "
    f"Tensor direct, Tensor upstream) -> {tensors(INPUTS)}",
)
def _linear_divergence_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *arguments, kept, direct, upstream = arguments  # type: ignore[assignment]
    call, student, teacher = _call(arguments)
    gradients = run_backward(
        call,
        student,
        teacher,
        kept.detach() if kept.shape[0] else None,  # not this function's to give back
        direct if call.heads.plan.schedule == "direct" else None,
        upstream,
    )
    needed = call.heads.student.request.needed(student.parameters)
    return tuple(
        one if need and one is not None else student.hidden.new_empty(0)
        for one, need in zip(gradients, needed, strict=True)
    )


@_linear_divergence_backward.register_fake
def _linear_divergence_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    request = Request.of(arguments[_TENSORS : _TENSORS + _FIELDS])
    return gradients_like(request, arguments[:INPUTS])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.settings = inputs[_TENSORS:]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    *given, kept, direct = ctx.saved_tensors
    gradients = torch.ops.fastpref.linear_divergence_backward(
        *given, *ctx.settings, kept, direct, upstream
    )
    student, _teacher = models(given[: 2 * INPUTS])
    needed = Request.of(ctx.settings[:_FIELDS]).needed(student.parameters)
    found = (one if need else None for one, need in zip(gradients, needed, strict=True))
    return (*found, *[None] * (_TENSORS - INPUTS + len(ctx.settings)))


torch.library.register_autograd("fastpref::linear_divergence", _differentiate, setup_context=_save)
torch.library.register_autograd("fastpref::linear_divergence_backward", refuse)


@torch.library.custom_op(
    "fastpref::mixed_logprob",
    mutates_args=(),
    schema=f"({MODELS}, Tensor scored, {SETTINGS}, Tensor target, float epsilon) -> {tensors(2)}",
)
def _mixed_logprob(*arguments: Any) -> tuple[Tensor, ...]:
    *given, target, epsilon = arguments
    student, teacher = models(given[: 2 * INPUTS])
    question = _question(given[2 * INPUTS], tuple(given[_TENSORS:]))
    heads = question.heads(student, teacher, traced=True)
    plus, minus = mixed_logprob(heads, student, teacher, target, epsilon)
    return plus.clone(), minus.clone()


@_mixed_logprob.register_fake
def _mixed_logprob_fake(*arguments: Any) -> tuple[Tensor, ...]:
    dtype = statistics_dtype(Request.of(arguments[_TENSORS : _TENSORS + _FIELDS]).dtype)
    like = arguments[-2]
    return like.new_empty(like.shape, dtype=dtype), like.new_empty(like.shape, dtype=dtype)
