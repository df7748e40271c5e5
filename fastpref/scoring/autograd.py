# SPDX-License-Identifier: Apache-2.0
"""The autograd nodes of the engine: models in, a rule's outputs out, any upstream gradient back to
the first model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import canary, straight, vocab_parallel
from .backward import Gradients, backward
from .forward import Kept, Run, forward
from .head import TENSORS, Head, Model
from .plan import Plan, less
from .reductions import full_precision_reductions
from .request import Call
from .retry import with_less
from .rules import Heads, Upstream
from .transforms import SECOND_DERIVATIVE, Differentiable, for_each, plain
from .types import AS_IT_IS, in_dtype, statistics_dtype

Outputs = tuple[Tensor | None, ...]  # of a rule, like the target


def run(call: Call, models: Sequence[Model]) -> Outputs:
    """The outputs of ``call.rule``."""
    # Entered only where something would be recorded: it takes as long as a small product.
    with torch.no_grad() if _must_not_record(call, models) else AS_IT_IS:
        failed: torch.OutOfMemoryError | None = None
        no_node = not call.request.needs_grad and forward_ad._current_level < 0
        if straight.serves(call, models[0]):
            try:
                return _straight(call, models[0], no_node), *straight.OTHERS
            except torch.OutOfMemoryError as error:
                failed = error  # The engine can do with less.
        if no_node:
            return run_forward(call, models, failed).outputs
        tensors = inputs_of(models, call)
        outputs: Outputs = Engine.apply(call, failed, *tensors)  # type: ignore[no-untyped-call]
        return outputs


def _must_not_record(call: Call, models: Sequence[Model]) -> bool:
    if call.request.needs_grad or not torch.is_grad_enabled():
        return False
    return any(one is not None and one.requires_grad for model in models for one in model.tensors)


def _straight(call: Call, model: Model, no_node: bool) -> Tensor:
    hidden, (weight, bias, *_) = model
    if no_node:
        return straight.forward(call, hidden, weight, bias)[0]
    logp: Tensor = StraightEngine.apply(call, hidden, weight, bias)  # type: ignore[no-untyped-call]
    return logp


def inputs_of(models: Sequence[Model], call: Call) -> list[Tensor | None]:
    """The tensors of a node, one of which needs a gradient where ``call`` does."""
    tensors = [one for model in models for one in model.tensors]
    if call.forms[0].basis is not None and call.request.needs_grad:
        # What is projected on a basis is a gradient at none of them.
        hidden = models[0].hidden
        tensors[0] = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
    return tensors


class StraightEngine(Differentiable):
    """``Engine``, of calls that straight.py serves."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        logp, ctx.numbers, matrix = straight.forward(call, hidden, weight, bias)
        ctx.save_for_backward(hidden, weight, bias, matrix)
        ctx.call = call
        return logp

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_logp is None:
            return None, None, None, None
        call: Call = ctx.call
        hidden, weight, bias, matrix = ctx.saved_tensors
        found: tuple[Tensor | None, ...] | None = None
        failed: torch.OutOfMemoryError | None = None
        # Backward may run under autocast where forward did not.
        recast = torch.is_autocast_enabled(hidden.device.type)
        if not torch.is_grad_enabled() and not recast and plain(d_logp):
            try:
                found = straight.backward(call, hidden, weight, ctx.numbers, matrix, d_logp)
            except torch.OutOfMemoryError as error:
                failed = error
        if found is None:
            model = Model(hidden, Head(weight, bias, None, None, call.forms[0]))
            kept = straight.kept(call, ctx.numbers, matrix)
            upstream = d_logp, *straight.OTHERS
            found = differentiate(call, [model], kept, upstream, failed=failed)[:2]
        return None, *found, None


class Engine(Differentiable):
    @staticmethod
    def forward(
        ctx: Any, call: Call, failed: torch.OutOfMemoryError | None, *tensors: Tensor | None
    ) -> Outputs:
        # An output nobody differentiates must not cost a gradient of zeros.
        ctx.set_materialize_grads(False)
        models = models_of(tensors, call)
        outputs, kept, heads, plan = run_forward(call, models, failed)
        if call.request.needs_grad:
            ctx.models = 1 if kept.direct else call.rule.formed_again
            # A saved tensor goes with the graph; an attribute would stay as long as the outputs.
            needed = tensors[: TENSORS * ctx.models]
            ctx.save_for_backward(*needed, *kept.matrices, *kept.direct)
            ctx.kept, ctx.call = kept._replace(matrices=(), direct=()), _under(plan, call)
            ctx.matrices = len(kept.matrices)
            # A copy of a single weight stays.
            copied = call.plan.copies_weight and call.rule.models == 1
            ctx.heads = heads if copied and call.forms[0].context is None else None
        names, differentiable = call.rule.output_names, call.rule.differentiable
        plain = [
            one
            for name, one in zip(names, outputs, strict=True)
            if one is not None and name not in differentiable
        ]
        if plain:
            ctx.mark_non_differentiable(*plain)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        saved = ctx.saved_tensors
        every, count = TENSORS * call.rule.models, TENSORS * ctx.models
        if all(one is None for one in upstream):
            return (None,) * (2 + every)
        tensors, held = saved[:count], saved[count:]
        # The matrices are without rows where an earlier backward has given them back.
        matrices, direct = held[: ctx.matrices], held[ctx.matrices :]
        kept = ctx.kept._replace(matrices=matrices, direct=direct)
        once = differentiate(call, models_of(tensors, call), kept, upstream, ctx.heads)
        return (None, None, *once, *[None] * (every - TENSORS))


def differentiate(
    call: Call,
    models: Sequence[Model],
    kept: Kept,
    upstream: Upstream,
    heads: Heads | None = None,
    failed: torch.OutOfMemoryError | None = None,
) -> tuple[Tensor | None, ...]:
    """``run_backward``, of batches of upstream gradients too, whose own derivatives raise."""

    def of_upstream(*upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return run_backward(call, models, kept, upstream, heads, failed)

    with torch.no_grad() if torch.is_grad_enabled() else AS_IT_IS:
        gradients = for_each(of_upstream, *upstream)
    return once_differentiable(gradients, (*models[0].tensors, *upstream))


class Finished(NamedTuple):
    """A forward pass."""

    outputs: Outputs
    kept: Kept
    heads: Heads | None
    plan: Plan  # that memory held


def models_of(tensors: Sequence[Tensor | None], call: Call) -> list[Model]:
    """From the tensors of the first ones, one after the other."""
    parts = [tensors[start : start + TENSORS] for start in range(0, len(tensors), TENSORS)]
    return [Model.of(part, form) for part, form in zip(parts, call.forms, strict=False)]


def _under(plan: Plan, call: Call) -> Call:
    """``call``, run by ``plan``."""
    return call if plan is call.plan else call._replace(plan=plan)


def run_forward(
    call: Call, models: Sequence[Model], failed: torch.OutOfMemoryError | None = None
) -> Finished:
    """Outputs, and what backward needs; with less than planned where memory runs out, as it has in
    ``failed`` for what straight.py does in the call's place."""
    hidden = models[0].hidden

    def attempt(plan: Plan) -> Finished:
        own = _under(plan, call)
        heads = own.heads(models)
        rows = [own.rows(model) for model in models]
        target = call.packing.gather(call.target.reshape(-1))
        outputs, kept = forward(Run(call.rule, heads, plan), rows, target, call.row_factor())
        if call.tuned:
            canary.watch(call, heads, rows[0], target, outputs)
        spread = tuple(None if one is None else _unpacked(one, call) for one in outputs)
        return Finished(spread, kept, heads, plan)

    with products_of(hidden):
        return with_less(attempt, call.plan, less, hidden.device, call.group, failed)


def run_backward(
    call: Call,
    models: Sequence[Model],
    kept: Kept,
    upstream: Upstream,
    heads: Heads | None = None,
    failed: torch.OutOfMemoryError | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients at each tensor of the first model; None where none is needed. What is projected on
    a basis is added to where that says. Where memory runs out the matrices in ``kept`` are given
    back and formed again, of ``models``: those that the rule needs for it.

    ``upstream`` are gradients at the outputs of the rule, ``failed`` is that of ``run_forward``.
    """
    model, held = models[0], kept
    basis = model.head.form.basis

    def attempt(plan: Plan) -> tuple[tuple[Tensor | None, ...], Gradients]:
        own = _under(plan, call)
        rows = [own.rows(one) for one in models]
        run = Run(
            call.rule, own.heads(models, held.mean) if heads is None else own.fitted(heads), plan
        )
        onto = model.head.trained_weight.dtype
        gradients = backward(run, rows, held, _packed(upstream, call), onto)
        d_hidden = d_a = None
        if gradients.hidden is not None:
            d_rows, d_a = row_gradients(call, gradients.hidden, rows[0], model)
            d_hidden = call.packing.spread(d_rows).view(model.hidden.shape)
        found = d_hidden, *model.head.by_tensor(gradients.weight, gradients.bias, d_a)
        return like(found, model.tensors), gradients

    def recomputing(plan: Plan) -> Plan | None:
        nonlocal held
        held = held.given_back()
        return None if held.direct else less(plan, keep=False)

    with _opened(models), products_of(model.hidden):
        device = model.hidden.device
        found, gradients = with_less(attempt, call.plan, recomputing, device, call.group, failed)
        if basis is not None:
            # Once, whatever ran out of memory before.
            basis.add(gradients.weight)
            basis.add_norms(gradients.norms)
        return found


def _opened(models: Sequence[Model]) -> contextlib.AbstractContextManager[Any]:
    """Within it the heads hold their data."""
    if all(one.head.form.context is None for one in models):
        return AS_IT_IS
    with contextlib.ExitStack() as stack:
        for one in models:
            stack.enter_context(one.head.opened())
        return stack.pop_all()


def row_gradients(
    call: Call, gradient: Tensor, rows: Tensor, model: Model
) -> tuple[Tensor, Tensor | None]:
    """The gradient at wide ``rows`` -> at hidden's rows, and at the update's A."""
    own = vocab_parallel.sum_over_ranks(gradient, call.reducing_group)
    return model.head.narrowed(own, rows, call.plan.product_room)


def like(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """In the dtype of each."""
    pairs = zip(gradients, tensors, strict=True)
    return tuple(
        None if one is None or own is None else in_dtype(one, own.dtype) for one, own in pairs
    )


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

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(SECOND_DERIVATIVE)


def on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def products_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """On the device of ``tensor``, where Triton launches, in the dtypes given, with sums that are
    not rounded on the way."""
    changes = on_cuda(tensor) or torch.is_autocast_enabled(tensor.device.type)
    return _products_of(tensor) if changes else AS_IT_IS


@contextlib.contextmanager
def _products_of(tensor: Tensor) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if on_cuda(tensor):
            stack.enter_context(torch.cuda.device(tensor.device))
            stack.enter_context(full_precision_reductions())
        stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
        yield


def _unpacked(values: Tensor, call: Call) -> Tensor:
    packing, shape = call.packing, call.target.shape
    spread = packing.spread(values)
    if packing.positions is None and packing.valid is not None and spread.shape == shape:
        return spread  # made just now
    # A copy: the caller may change it, and backward reads the original; autograd refuses in-place
    # changes of a view among several outputs.
    return spread.view(shape).clone()


def _packed(upstream: Upstream, call: Call) -> Upstream:
    dtype = statistics_dtype(call.plan.dtype)
    return [
        None if one is None else call.packing.gather(in_dtype(one.reshape(-1), dtype)).contiguous()
        for one in upstream
    ]
