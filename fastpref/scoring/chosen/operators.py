# SPDX-License-Identifier: Apache-2.0
"""Logits of chosen vocabulary ids as registered operators, which torch.compile traces without
looking inside. A tensor that is not there is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head import TENSORS, Form, Model
from ..operators import REQUEST, refuse_context
from ..request import Request
from ..settings import Settings
from ..transforms import SECOND_DERIVATIVE
from ..types import statistics_dtype
from .passes import ChosenCall, plan_chosen, run_backward, run_forward

_FORM = Settings(Form)
_MODEL = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b"
_GIVEN = f"{_MODEL}, Tensor ids, Tensor? target"
_SETTINGS = f"{REQUEST.schema}, {_FORM.schema}"
_INPUTS = TENSORS + 2  # models, ids and target


def run(request: Request, model: Model, ids: Tensor, target: Tensor | None) -> Tensor:
    settings = _settings(request, model)
    logits: Tensor
    logits, _ = torch.ops.fastpref.linear_logits(*model.tensors, ids, target, *settings)
    return logits


def gradients(
    call: ChosenCall, model: Model, ids: Tensor, raw: Tensor | None, upstream: Tensor
) -> list[Tensor | None]:
    """At each tensor of ``model``; None where none is needed."""
    given = (*model.tensors, ids, call.target, upstream.new_empty(0) if raw is None else raw)
    settings = _settings(call.request, model)
    return _needed(
        torch.ops.fastpref.linear_logits_backward(*given, upstream, *settings), given, settings
    )


def _settings(request: Request, model: Model) -> tuple[Any, ...]:
    refuse_context(model.head.form)
    return (*REQUEST.put(request), *_FORM.put(model.head.form))


def _needed(
    found: Sequence[Tensor], given: Sequence[Any], settings: Sequence[Any]
) -> list[Tensor | None]:
    needed = _Given.of(given[:_INPUTS], settings).needed
    return [one if need else None for one, need in zip(found, needed, strict=True)]


class _Given(NamedTuple):
    """The arguments of an operator."""

    request: Request
    model: Model
    ids: Tensor
    target: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Any], settings: Sequence[Any]) -> _Given:
        request = REQUEST.take(tuple(settings[: len(REQUEST)]))
        form = _FORM.take(tuple(settings[len(REQUEST) :]))
        return cls(request, Model.of(tensors[:TENSORS], form), *tensors[TENSORS:])

    def call(self) -> ChosenCall:
        return plan_chosen(self.request, self.model, self.target, traced=True)

    @property
    def needed(self) -> tuple[bool, ...]:
        return self.request.needed(self.model)

    def gradients(self, found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """As the backward operator returns them."""
        empty = self.model.hidden.new_empty(0)
        pairs = zip(found, self.needed, strict=True)
        return tuple(one if need and one is not None else empty.clone() for one, need in pairs)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Given.of(arguments[:_INPUTS], arguments[_INPUTS:])
    logits, raw = run_forward(given.call(), given.model, given.ids)
    return logits, logits.new_empty(0) if raw is None else raw


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Given.of(arguments[:_INPUTS], arguments[_INPUTS:])
    exact, shape = statistics_dtype(given.request.dtype), given.ids.shape
    capped = given.model.head.form.map.cap != 0
    none = given.model.hidden.new_empty
    return none(shape, dtype=exact), none(shape if capped else 0, dtype=exact)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    raw, upstream = arguments[_INPUTS : _INPUTS + 2]
    given = _Given.of(arguments[:_INPUTS], arguments[_INPUTS + 2 :])
    call = given.call()
    raw = raw if call.form.map.cap else None
    return given.gradients(run_backward(call, given.model, given.ids, raw, upstream, given.needed))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = _Given.of(arguments[:_INPUTS], arguments[_INPUTS + 2 :])
    like = (
        None if one is None else torch.empty_like(one, memory_format=torch.contiguous_format)
        for one in given.model.tensors
    )
    return given.gradients(tuple(like))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.settings = inputs[_INPUTS:]
    raw = output[1]
    ctx.save_for_backward(*inputs[:_INPUTS], raw)
    ctx.mark_non_differentiable(raw)


def _differentiate(ctx: Any, upstream: Tensor, _: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    found = torch.ops.fastpref.linear_logits_backward(*saved, upstream, *ctx.settings)
    return (*_needed(found, saved, ctx.settings), *[None] * (_INPUTS - TENSORS + len(ctx.settings)))


def _refuse(ctx: Any, *upstream: Tensor) -> Any:
    raise RuntimeError(SECOND_DERIVATIVE)


def _register() -> None:
    name = "fastpref::linear_logits"
    schema = f"({_GIVEN}, {_SETTINGS}) -> (Tensor, Tensor)"
    forward = torch.library.custom_op(name, _forward, mutates_args=(), schema=schema)
    forward.register_fake(_forward_fake)
    torch.library.register_autograd(name, _differentiate, setup_context=_save)
    gradients = ", ".join(["Tensor"] * TENSORS)
    backward = torch.library.custom_op(
        f"{name}_backward",
        _backward,
        mutates_args=(),
        schema=f"({_GIVEN}, Tensor raw, Tensor grad_logits, {_SETTINGS}) -> ({gradients})",
    )
    backward.register_fake(_backward_fake)
    torch.library.register_autograd(f"{name}_backward", _refuse)


_register()
