# SPDX-License-Identifier: Apache-2.0
"""Scores and the gradient of a loss on them in one pass, for losses that are sums over groups of
rows.

The rows come in batches of whole groups. While a batch's exponentials are in memory the loss is
evaluated on all scores known so far and its gradient, right for every group that is complete, goes
through the products of the batch. Three products where keeping would need too much memory and
recomputing would take four; in return d weight is added to once a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import autograd, canary
from .autograd import (
    Outputs,
    inputs_of,
    models_of,
    once_differentiable,
    products_of,
    row_gradients,
)
from .backward import Gradients, backward
from .forward import Run, forward
from .head import TENSORS, Model
from .plan import MEBIBYTE, Plan, choose, in_float32, less, rows_to_keep, tile_budget
from .request import Call
from .retry import nothing_less, random_state, with_less
from .rules import Heads
from .transforms import Differentiable, for_each
from .types import ScoringOptions, statistics_dtype

# Rows of a product that take as long as adding a product onto (V, H) float32 totals: measured on
# two cores; by bandwidth and peak of an H200.
ACCUMULATION_ROWS = {"cpu": 100, "cuda": 700}

LossOfOutputs = Callable[[Outputs], Tensor]
# The loss, all outputs of the rule, the gradient at the rows of the positions, at the head's
# tensors, and what of it is projected on a basis.
Outcome = tuple[Tensor, Outputs, Tensor | None, tuple[Tensor | None, ...], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class BatchedPlan:
    """Batches of whole groups, with their cost. What ``explain`` returns where they run."""

    plans: tuple[Plan, ...]  # of each batch
    schedule: str = "batches"

    @property
    def largest(self) -> Plan:
        return max(self.plans, key=lambda plan: plan.scored)

    @property
    def scored(self) -> int:
        return sum(plan.scored for plan in self.plans)

    @property
    def units(self) -> float:
        """Cost in u, one u being a product of all scored rows; all of it in the forward pass."""
        return self.product_units + self.accumulation_units

    @property
    def product_units(self) -> float:
        """Of the products."""
        return sum(plan.units * plan.scored for plan in self.plans) / max(1, self.scored)

    @property
    def accumulation_units(self) -> float:
        """What it takes as long as to add the weight's gradient up once a batch."""
        plan = self.plans[0]
        if not plan.needs_weight or len(self.plans) == 1:
            return 0.0
        share = plan.trained_size / plan.hidden_size
        rows = ACCUMULATION_ROWS.get(plan.device_type, 0) * len(self.plans) * share
        return rows / max(1, self.scored)

    @property
    def saved_bytes(self) -> int:
        """Held from forward to backward, beside the arguments: the gradients, that of the weight in
        the statistics' dtype."""
        plan = self.plans[0]
        exact = statistics_dtype(plan.dtype).itemsize
        held = self.scored * (plan.hidden_size * plan.itemsize + 8)
        if plan.needs_weight:
            held += plan.vocab_size * plan.trained_size * exact
        if plan.needs_bias:
            held += plan.vocab_size * 8
        return held

    @property
    def workspace_bytes(self) -> int:
        """Working memory at its peak, ``saved_bytes`` included, results and gradients not."""
        return self.saved_bytes + self.largest.workspace_bytes

    def __str__(self) -> str:
        plan = self.largest
        return (
            f"batches on {plan.backend}: {self.units:.2f}u in {len(self.plans)} batches of whole "
            f"groups, at most {plan.scored} of {self.scored} rows each ({plan.schedule}), "
            f"workspace {self.workspace_bytes / MEBIBYTE:.1f} MiB "
            f"(budget {plan.memory_budget / MEBIBYTE:.1f} MiB, {plan.budget_from})"
            f"{in_float32(plan)}"
        )


def choose_for_groups(
    plan: Plan, options: ScoringOptions, groups: Callable[[], Sequence[int]] | str
) -> Plan | BatchedPlan:
    """Batches where they cost less than ``plan``, the best for two passes.

    Args:
        groups: scored rows of each group, in the order of the batches, asked for only where batches
            may be better; or why there are none.

    Raises:
        ValueError: batches were asked for and cannot be.
    """
    forced = options.schedule == "batches"
    if not plan.needs_grad or not plan.scored:
        return plan
    if isinstance(groups, str):
        if forced:
            raise ValueError(
                f"schedule='batches' cannot serve this call: {groups}; use schedule='auto'"
            )
        return plan
    best = plan.kept_rows == plan.scored or (plan.schedule == "direct" and plan.matrices == 1)
    if not forced and (options.schedule != "auto" or best):
        return plan
    batched = BatchedPlan(plans=tuple(_plans(plan, options, groups())))
    return batched if forced or batched.units < plan.units else plan


def _plans(whole: Plan, options: ScoringOptions, groups: Sequence[int]) -> Iterator[Plan]:
    options = replace(options, schedule="keep")
    capacity = max(1, rows_to_keep(whole, tile_budget(whole, whole.memory_budget)))
    even = whole.scored / math.ceil(whole.scored / capacity)
    rows = 0
    for group in groups:
        if rows and (rows >= even or rows + group > capacity):
            yield choose(whole.of_rows(rows), options)
            rows = 0
        rows += group
    if rows:
        yield choose(whole.of_rows(rows), options)


def score_with_loss(
    call: Call,
    plan: BatchedPlan,
    positions: Tensor,
    loss: LossOfOutputs,
    models: Sequence[Model],
) -> tuple[Tensor, Outputs]:
    """The loss, and the outputs of ``call.rule`` that it is of.

    Args:
        positions: (N,) scored positions of the target, those of a group together, in the order of
            the plan's batches.
        loss: of the outputs to a 0-dim tensor; the gradient at those of a group must not depend on
            other groups, nor must it be NaN while those hold 0. Called once a batch.

    A gradient at an output is answered by scoring again, by ``call``'s own plan. Where
    memory runs out two passes recompute, without totals of the gradients from forward to backward,
    and the loss is called once more, with the random state of before.
    """
    device = models[0].hidden.device
    as_before = random_state(device)

    def attempt(plan: BatchedPlan | Plan) -> tuple[Tensor, Outputs]:
        as_before()
        if isinstance(plan, Plan):
            found = autograd.run(call._replace(plan=plan), models)
            return loss(found), found
        tensors = inputs_of(models, call)
        value, *outputs = BatchedLoss.apply(call, plan, positions, loss, *tensors)  # type: ignore[no-untyped-call]
        return value, tuple(outputs)

    def two_passes(plan: BatchedPlan | Plan) -> Plan | None:
        # Which take less themselves where that is not enough.
        return None if isinstance(plan, Plan) else less(call.plan, keep=False) or call.plan

    planned: BatchedPlan | Plan = plan
    return with_less(attempt, planned, two_passes, device, call.group)


class BatchedLoss(Differentiable):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        plan: BatchedPlan,
        positions: Tensor,
        loss: LossOfOutputs,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        models = [model.detached() for model in models_of(tensors, call)]
        with products_of(models[0].hidden):
            one_pass = _OnePass(call, plan, positions, loss)
            value, outputs, d_rows, gradients, projected = one_pass.run(models)
        ctx.call, ctx.plan = call, plan
        ctx.save_for_backward(*tensors, positions, d_rows, projected, *gradients)
        names, differentiable = call.rule.output_names, call.rule.differentiable
        named = zip(names, outputs, strict=True)
        ctx.mark_non_differentiable(
            *(one for name, one in named if one is not None and name not in differentiable)
        )
        return value, *outputs

    @staticmethod
    def backward(
        ctx: Any, d_loss: Tensor | None, *d_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        count = TENSORS * call.rule.models
        tensors, (positions, d_rows, projected, *d_head) = saved[:count], saved[count:]
        models = models_of(tensors, call)
        hidden, head = models[0]

        def of_upstream(d_loss: Tensor | None, *d_outputs: Tensor | None) -> Outputs:
            def scaled(plan: BatchedPlan) -> list[Tensor | None]:
                if d_loss is None:
                    return [None] * TENSORS
                rows = None if d_rows is None else _spread(d_rows * d_loss, positions, hidden)
                pairs = zip(d_head, head.tensors, strict=True)
                return [rows, *(_scaled(one, d_loss, own) for one, own in pairs)]

            gradients = with_less(scaled, ctx.plan, nothing_less, hidden.device, call.group)
            if any(one is not None for one in d_outputs):
                _, kept, heads, plan = autograd.run_forward(call, models)
                again = call._replace(plan=plan)
                needed = models[: 1 if kept.direct else call.rule.formed_again]
                more = autograd.run_backward(again, needed, kept, d_outputs, heads)

                def added(plan: Plan) -> list[Tensor | None]:
                    return [_added(a, b) for a, b in zip(gradients, more, strict=True)]

                gradients = with_less(added, call.plan, nothing_less, hidden.device, call.group)
            if head.form.basis is not None and d_loss is not None:
                head.form.basis.add(projected, d_loss)
            return tuple(gradients)

        with torch.no_grad():
            gradients = for_each(of_upstream, d_loss, *d_outputs)
        depends_on = (*tensors[:TENSORS], d_loss, *d_outputs)
        once = once_differentiable(gradients, depends_on)
        return (None, None, None, None, *once, *[None] * (count - TENSORS))


@dataclass(frozen=True)
class _OnePass:
    call: Call
    plan: BatchedPlan
    positions: Tensor
    loss: LossOfOutputs

    def run(self, models: Sequence[Model]) -> Outcome:
        call, (hidden, head) = self.call, models[0]
        heads, outputs = call.heads(models), self._nothing_yet()
        totals, d_a, d_rows = self._totals(heads), None, None
        if call.request.needs_hidden:
            shape = len(self.positions), hidden.shape[-1]
            d_rows = hidden.new_empty(shape, dtype=call.plan.dtype)
        value, start = call.target.new_zeros(()), 0
        for plan in self.plan.plans:
            at = self.positions[start : start + plan.scored]
            rows = [_rows_at(one, at, plan) for one in models]
            run = Run(call.rule, heads, plan)
            value, gradients = self._batch(run, rows, at, outputs, totals)
            if d_rows is not None and gradients.hidden is not None:
                d_rows[start : start + plan.scored], d_a_part = row_gradients(
                    call, gradients.hidden, rows[0], models[0]
                )
                d_a = _added(d_a, None if d_a_part is None else d_a_part.to(value.dtype))
            start += plan.scored
        projected = None if head.form.basis is None else totals.weight
        d_head = head.by_tensor(totals.weight, totals.bias, d_a)
        return value, outputs, d_rows, d_head, projected

    def _batch(
        self, run: Run, rows: list[Tensor], at: Tensor, outputs: Outputs, totals: Gradients
    ) -> tuple[Tensor, Gradients]:
        """The loss of all outputs so far and the gradient at ``rows``; theirs go into ``outputs``.

        A function of its own, so that what is kept is gone before that of the next batch.
        """
        own, factor = self.call.target.view(-1).index_select(0, at), self.call.factor
        if factor is not None:
            factor = factor.view(-1).index_select(0, at)
        found, kept = forward(run, rows, own, factor)
        if self.call.tuned:
            canary.watch(self.call, run.heads, rows[0], own, found)
        for total, part in zip(outputs, found, strict=True):
            if total is not None and part is not None:
                total.view(-1).index_copy_(0, at, part)
        value, slopes = self._loss_and_slopes(outputs)
        upstream = [None if one is None else one.reshape(-1).index_select(0, at) for one in slopes]
        return value, backward(run, rows, kept, upstream, totals)

    def _nothing_yet(self) -> Outputs:
        rule, target = self.call.rule, self.call.target
        exact = statistics_dtype(self.call.plan.dtype)
        return tuple(
            target.new_zeros(target.shape, dtype=torch.bool if name.endswith("is_top1") else exact)
            if name in rule.outputs
            else None
            for name in rule.output_names
        )

    def _totals(self, heads: Heads) -> Gradients:
        request, head = self.call.request, heads.projectors[0]
        d_weight = d_bias = None
        if request.needs_weight:
            shape = head.weight.shape[0], head.trained_size
            d_weight = head.weight.new_zeros(shape, dtype=statistics_dtype(head.weight.dtype))
        if request.needs_bias:
            d_bias = head.weight.new_zeros(head.weight.shape[0], dtype=torch.float64)
        return Gradients(None, d_weight, d_bias)

    def _loss_and_slopes(self, outputs: Outputs) -> tuple[Tensor, Outputs]:
        """The loss, and its gradients at the outputs that are differentiable."""
        names, differentiable = self.call.rule.output_names, self.call.rule.differentiable
        with torch.enable_grad():
            given = [
                None if one is None else one.detach().requires_grad_(name in differentiable)
                for name, one in zip(names, outputs, strict=True)
            ]
            value = self.loss(tuple(given))
            leaves = [one for one in given if one is not None and one.requires_grad]
            slopes = iter(torch.autograd.grad(value, leaves, allow_unused=True))
        found = (next(slopes) if one is not None and one.requires_grad else None for one in given)
        return value.detach(), tuple(found)


def _rows_at(model: Model, positions: Tensor, plan: Plan) -> Tensor:
    hidden, head = model
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
    return head.widened(rows.to(plan.dtype), plan.product_room)


def _spread(rows: Tensor, positions: Tensor, like: Tensor) -> Tensor:
    """(N, H) -> the shape and dtype of hidden, 0 elsewhere."""
    out = torch.zeros_like(like, memory_format=torch.contiguous_format)
    out.view(-1, like.shape[-1]).index_copy_(0, positions, rows.to(like.dtype))
    return out


def _scaled(total: Tensor | None, by: Tensor, like: Tensor | None) -> Tensor | None:
    """In the dtype of ``like``, without a product in the wider dtype of the totals beside them."""
    if total is None or like is None:
        return None
    return torch.mul(total, by, out=torch.empty_like(total, dtype=like.dtype))


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
