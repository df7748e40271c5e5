# SPDX-License-Identifier: Apache-2.0
"""The engine as registered operators, which torch.compile traces without looking inside.

For each rule, forward and backward are one operator each. What lives between them are explicit
tensors, whose number of rows, that of the scored positions, is only known when they run; which
schedule runs is decided then too, from the same sizes on both sides. A tensor that is not there is
empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .autograd import Outputs, run_backward, run_forward
from .forward import Kept
from .head import TENSORS, Form, Model
from .request import Call, Request, plan_target
from .rules import Rule
from .rules.compared import WithDivergence, WithMixture
from .rules.divergence import Divergence
from .rules.scores import Scores
from .settings import Settings
from .transforms import SECOND_DERIVATIVE, Transformed, active, for_each
from .types import statistics_dtype

R = TypeVar("R", bound=Rule)

REQUEST = Settings(Request)
_MODEL = (
    "Tensor {}hidden",
    "Tensor {}weight",
    "Tensor? {}bias",
    "Tensor? {}lora_a",
    "Tensor? {}lora_b",
)


class _Given(NamedTuple):
    """The arguments of an operator."""

    request: Request
    rule: Rule
    models: list[Model]
    target: Tensor
    temperature: Tensor | None

    def call(self) -> Call:
        given = self.request, self.rule, self.models, self.target
        return plan_target(*given, traced=True, temperature=self.temperature)

    @property
    def needed(self) -> tuple[bool, ...]:
        return self.request.needed(self.models[0])

    def gradients(self, found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """What is formed of them, as a backward operator returns it."""
        empty = self.models[0].hidden.new_empty(0)
        return tuple(
            one if need and one is not None else empty.clone()
            for one, need in zip(found, self.needed, strict=True)
        )


class Operators(Generic[R]):
    """Those of one rule."""

    def __init__(self, name: str, rule: type[R]) -> None:
        prefixes = ("", "teacher_")[: rule.models]
        self.name, self.kind = f"fastpref::{name}", rule
        self.rule = Settings(rule)
        self.forms = [Settings(Form, prefix) for prefix in prefixes]
        self.inputs = TENSORS * rule.models + 2  # models, target and temperature
        tensors = [one.format(prefix) for prefix in prefixes for one in _MODEL]
        given = ", ".join([*tensors, "Tensor target", "Tensor? temperature"])
        settings = [REQUEST.schema, self.rule.schema, *(form.schema for form in self.forms)]
        numbers = [f"kept_{one}" for one in rule.number_names]
        matrices = [f"{one}_{i}" for one in ("matrix", "direct") for i in range(rule.matrices)]
        self.held = len(numbers) + len(matrices)
        held = [f"Tensor {one}" for one in (*numbers, *matrices)]
        upstream = [f"Tensor? grad_{one}" for one in rule.output_names]
        self._register(
            f"({given}, {', '.join(settings)}) -> {_tensors(len(rule.output_names) + self.held)}",
            f"({', '.join([given, *held, *upstream, *settings])}) -> {_tensors(TENSORS)}",
        )

    def _register(self, forward: str, backward: str) -> None:
        own = torch.library.custom_op(self.name, self.forward, mutates_args=(), schema=forward)
        own.register_fake(self._forward_fake)
        name = self.name + "_backward"
        other = torch.library.custom_op(name, self._backward, mutates_args=(), schema=backward)
        other.register_fake(self._backward_fake)
        torch.library.register_autograd(self.name, self._differentiate, setup_context=self.save)
        torch.library.register_autograd(name, _refuse)
        self.operator = getattr(torch.ops.fastpref, self.name.split("::")[1])
        self.backward_operator = getattr(torch.ops.fastpref, name.split("::")[1])

    def run(
        self,
        request: Request,
        rule: R,
        models: Sequence[Model],
        target: Tensor,
        temperature: Tensor | None = None,
    ) -> Outputs:
        arguments = self.arguments(request, rule, models, target, temperature)
        if active():
            found = Transformed.apply(self, *arguments)  # type: ignore[no-untyped-call]
        else:
            found = self.operator(*arguments)
        return tuple(found[: len(rule.output_names)])

    def arguments(
        self,
        request: Request,
        rule: R,
        models: Sequence[Model],
        target: Tensor,
        temperature: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Of the forward operator."""
        tensors = [one for model in models for one in model.tensors]
        settings = [*REQUEST.put(request), *self.rule.put(rule)]
        for form, model in zip(self.forms, models, strict=True):
            refuse_context(model.head.form)
            _refuse_basis(model.head.form)
            settings += form.put(model.head.form)
        return (*tensors, target, temperature, *settings)

    def _given(self, tensors: Sequence[Any], settings: Sequence[Any]) -> _Given:
        """From the tensors of models, target and temperature, and all settings."""
        left = list(settings)

        def taken(one: Settings[Any]) -> Any:
            own, left[:] = left[: len(one)], left[len(one) :]
            return one.take(tuple(own))

        request, rule, forms = taken(REQUEST), taken(self.rule), [taken(one) for one in self.forms]
        models = [
            Model.of(tensors[i * TENSORS : (i + 1) * TENSORS], form) for i, form in enumerate(forms)
        ]
        return _Given(request, rule, models, *tensors[self.inputs - 2 : self.inputs])

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        given = self._given(arguments[: self.inputs], arguments[self.inputs :])
        hidden, call = given.models[0].hidden, given.call()
        outputs, kept, _, plan = run_forward(call, given.models)
        # Of one storage, perhaps; what an operator returns must not share any.
        numbers = [None if one is None else one.clone() for one in kept.numbers]
        none, columns = hidden.new_empty, given.models[0].head.columns
        matrices = kept.matrices or [
            none((0, columns), dtype=plan.dtype) for _ in range(given.rule.matrices)
        ]
        direct = kept.direct or [
            none((0, plan.hidden_size), dtype=plan.dtype) for _ in range(given.rule.matrices)
        ]
        found = (*outputs, *numbers, *matrices, *direct)
        return tuple(none(0) if one is None else one for one in found)

    def _forward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        given = self._given(arguments[: self.inputs], arguments[self.inputs :])
        rule, head = given.rule, given.models[0].head
        scored, kept, direct = self._held_rows(given)
        dtype, none = given.request.dtype, given.models[0].hidden.new_empty
        exact = statistics_dtype(dtype)
        outputs = [
            none(given.target.shape, dtype=torch.bool if name.endswith("is_top1") else exact)
            if name in rule.outputs
            else none(0)
            for name in rule.output_names
        ]
        numbers = [
            none(scored, dtype=exact) if name in rule.numbers else none(0)
            for name in rule.number_names
        ]
        matrices = [none((kept, head.columns), dtype=dtype) for _ in range(rule.matrices)]
        inner = head.sizes(dtype).inner
        directs = [none((direct, inner), dtype=dtype) for _ in range(rule.matrices)]
        return (*outputs, *numbers, *matrices, *directs)

    def _held_rows(self, given: _Given) -> tuple[Any, Any, Any]:
        """Of numbers, of matrices and of their products, where there are any."""
        rule = given.rule
        if given.request.whole:
            plan = given.call().plan
            return plan.scored, plan.kept_rows, plan.scored if plan.schedule == "direct" else 0
        context = torch.library.get_ctx()
        # Only as many as there are results of.
        scored = context.new_dynamic_size() if rule.numbers else 0
        kept, direct = (context.new_dynamic_size() if rule.matrices else 0 for _ in range(2))
        return scored, kept, direct

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        held_at, at = self.inputs, self.inputs + self.held
        upstream_to = at + len(self.kind.output_names)
        given = self._given(arguments[: self.inputs], arguments[upstream_to:])
        call, held = given.call(), arguments[held_at:at]
        names, count = self.kind.number_names, self.kind.matrices
        numbers, rest = held[: len(names)], held[len(names) :]
        matrices, direct = rest[:count], rest[count:]
        kept = Kept(
            call.packing.gather(call.target.reshape(-1)),
            tuple(
                one if name in given.rule.numbers else None
                for one, name in zip(numbers, names, strict=True)
            ),
            # Not this function's to give back.
            tuple(one.detach() for one in matrices if one.shape[0]),
            tuple(one for one in direct if one.shape[0]),
            factor=call.row_factor(),
        )
        models = given.models[: 1 if kept.direct else given.rule.formed_again]
        return given.gradients(run_backward(call, models, kept, arguments[at:upstream_to]))

    def _backward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        upstream_to = self.inputs + self.held + len(self.kind.output_names)
        given = self._given(arguments[: self.inputs], arguments[upstream_to:])
        return given.gradients(
            [
                None
                if one is None
                else torch.empty_like(one, memory_format=torch.contiguous_format)
                for one in given.models[0].tensors
            ]
        )

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        names, ctx.settings = self.kind.output_names, inputs[self.inputs :]
        differentiable = self._given(inputs, ctx.settings).rule.differentiable
        held = output[len(names) :]
        ctx.save_for_backward(*inputs[: self.inputs], *held)
        plain = [
            one for name, one in zip(names, output, strict=False) if name not in differentiable
        ]
        ctx.mark_non_differentiable(*plain, *held)

    def differentiate(self, ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        """For ``Transformed``."""
        settings = ctx.settings

        def backward(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return self._backward(*tensors, *settings)

        return self._gradients(ctx, for_each(backward, *self._tensors(ctx, upstream)))

    def _differentiate(self, ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        found = self.backward_operator(*self._tensors(ctx, upstream), *ctx.settings)
        return self._gradients(ctx, found)

    def _tensors(self, ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Of the backward operator's arguments."""
        return *ctx.saved_tensors, *upstream[: len(self.kind.output_names)]

    def _gradients(self, ctx: Any, found: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """At the forward operator's arguments."""
        needed = self._given(ctx.saved_tensors[: self.inputs], ctx.settings).needed
        own = [one if need else None for one, need in zip(found, needed, strict=True)]
        return (*own, *[None] * (self.inputs - TENSORS + len(ctx.settings)))


def refuse_context(form: Form) -> None:
    """A context is none of an operator's arguments."""
    if form.context is not None:
        raise ValueError(
            "weight_context is known to neither torch.compile, torch.func nor fake tensors; leave "
            "it None, or call without them"
        )


def _refuse_basis(form: Form) -> None:
    """Nor is what a backward pass adds to."""
    if form.basis is not None:
        raise ValueError(
            "weight_grad_basis is known to neither torch.compile, torch.func nor fake tensors, "
            "whose backward may not add to a tensor of the caller's; leave it None, or call "
            "without them (torch.compiler.disable on the function that calls)"
        )


def _tensors(number: int) -> str:
    """The type of so many, in a schema."""
    return f"({', '.join(['Tensor'] * number)})"


def _refuse(ctx: Any, *upstream: Tensor) -> Any:
    raise RuntimeError(SECOND_DERIVATIVE)


SCORES = Operators("linear_scores", Scores)
DIVERGENCE = Operators("linear_divergence", Divergence)
WITH_DIVERGENCE = Operators("linear_scores_and_divergence", WithDivergence)
WITH_MIXTURE = Operators("linear_scores_and_mixture", WithMixture)
OF_RULE: dict[type[Any], Operators[Any]] = {
    one.kind: one for one in (SCORES, DIVERGENCE, WITH_DIVERGENCE, WITH_MIXTURE)
}
