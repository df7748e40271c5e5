# SPDX-License-Identifier: Apache-2.0
"""Scores and the gradient of a loss on them in one pass, for losses that are sums over groups of
rows.

The rows come in batches of whole groups. While a batch's exponentials are in memory the loss is
evaluated on all scores known so far and its gradient, right for every group that is complete, goes
through the products of the batch. Three products where keeping would need too much memory and
recomputing would take four; in return d weight is added to once a batch.

Of directed rows (plan.py) the slopes of the loss at scores of 0 already have the right direction,
and only their length is to come. A group that the budget does not hold is then cut into pieces: the
gradient along that direction goes through the products of each while it is in memory, into sums of
the group's own, which are multiplied by the length once all of the group is scored.
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
from .plan import (
    LEAST_ROWS,
    MEBIBYTE,
    Plan,
    Problem,
    choose,
    in_float32,
    less,
    rows_to_keep,
    tile_budget,
)
from .products import split
from .request import Call
from .retry import nothing_less, random_state, with_less
from .rules import Rule
from .rules.compared import AlongDirection, WithDivergence
from .transforms import Differentiable, for_each
from .types import ScoringOptions, statistics_dtype

# Rows of a product that take as long as adding a product onto (V, H) float32 totals: measured on
# two cores; by bandwidth and peak of an H200.
ACCUMULATION_ROWS = {"cpu": 100, "cuda": 700}


def accumulation_rows(problem: Problem) -> float:
    """Rows of a product that take as long as adding a gradient of the weight up."""
    rows = ACCUMULATION_ROWS.get(problem.device_type, 0) if problem.needs_weight else 0
    return rows * problem.trained_size / problem.hidden_size


LossOfOutputs = Callable[[Outputs], Tensor]
# The loss, all outputs of the rule, the gradient at the rows of the positions, at the head's
# tensors, and what of it is projected on a basis.
Outcome = tuple[Tensor, Outputs, Tensor | None, tuple[Tensor | None, ...], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class BatchedPlan:
    """Batches of whole groups, with their cost. What ``explain`` returns where they run."""

    batches: tuple[tuple[Plan, ...], ...]  # one plan each, or those of the pieces of one group
    schedule: str = "batches"

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One after the other."""
        return tuple(plan for pieces in self.batches for plan in pieces)

    @property
    def in_pieces(self) -> bool:
        """Whether a group is."""
        return any(len(pieces) > 1 for pieces in self.batches)

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
        """What it takes as long as to add the weight's gradient up: once a batch, and of a group in
        pieces once each and once more."""
        plan = self.plans[0]
        if len(self.plans) == 1:
            return 0.0
        times = sum(len(pieces) + (len(pieces) > 1) for pieces in self.batches)
        return times * accumulation_rows(plan) / max(1, self.scored)

    @property
    def saved_bytes(self) -> int:
        """Held from forward to backward, beside the arguments: the gradients, that of the weight in
        the statistics' dtype."""
        plan = self.plans[0]
        return self.scored * (plan.hidden_size * plan.itemsize + 8) + self._head_bytes

    @property
    def workspace_bytes(self) -> int:
        """Working memory at its peak, ``saved_bytes`` included, results and gradients not."""
        group = self._head_bytes if self.in_pieces else 0
        return self.saved_bytes + group + self.largest.workspace_bytes

    @property
    def _head_bytes(self) -> int:
        """Of sums of the head's gradients."""
        plan = self.plans[0]
        exact = statistics_dtype(plan.dtype).itemsize
        weight = plan.vocab_size * plan.trained_size * exact if plan.needs_weight else 0
        return weight + (plan.vocab_size * 8 if plan.needs_bias else 0)

    def __str__(self) -> str:
        plan = self.largest
        return (
            f"batches on {plan.backend}: {self.units:.2f}u in {len(self.batches)} batches of whole "
            f"groups, at most {plan.scored} of {self.scored} rows at a time ({plan.schedule}), "
            f"workspace {self.workspace_bytes / MEBIBYTE:.1f} MiB "
            f"(budget {plan.memory_budget / MEBIBYTE:.1f} MiB, {plan.budget_from})"
            f"{in_float32(plan)}"
        )


def choose_for_groups(
    plan: Plan,
    options: ScoringOptions,
    groups: Callable[[], Sequence[int]] | str,
    directed: bool = False,
) -> Plan | BatchedPlan:
    """Batches where they cost less than ``plan``, the best for two passes.

    Args:
        groups: scored rows of each group, in the order of the batches, asked for only where batches
            may be better; or why there are none.
        directed: whether the rows of batches are, each group with a length of its own.

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
    whole = replace(plan, matrices=1, directed=True) if directed else plan
    batched = BatchedPlan(batches=tuple(_batches(whole, options, groups())))
    return batched if forced or batched.units < plan.units else plan


def _batches(
    whole: Plan, options: ScoringOptions, groups: Sequence[int]
) -> Iterator[tuple[Plan, ...]]:
    options = replace(options, schedule="keep")
    capacity = _capacity(whole)
    even = whole.scored / math.ceil(whole.scored / capacity)

    def of_rows(rows: int) -> tuple[Plan, ...]:
        pieces = math.ceil(rows / capacity) if whole.directed else 1
        cut = split(0, rows, math.ceil(rows / pieces))
        return tuple(choose(whole.of_rows(at.stop - at.start), options) for at in cut)

    rows = 0
    for group in groups:
        if rows and (rows >= even or rows + group > capacity):
            yield of_rows(rows)
            rows = 0
        rows += group
    if rows:
        yield of_rows(rows)


def _capacity(whole: Plan) -> int:
    """Rows of a batch, or of a piece."""
    if whole.directed and not (whole.needs_weight or whole.needs_bias):
        return whole.scored  # multiplied with the weight at once, none is kept
    budget = tile_budget(whole, whole.memory_budget)
    rows = rows_to_keep(whole, budget)
    if whole.directed:
        # Two of the least tiles lie beside them. What two pieces add up, three times, takes no
        # longer than one product.
        least = max(LEAST_ROWS, math.ceil(3 * accumulation_rows(whole)))
        rows = max(least, min(rows, budget // whole.row_bytes - 2 * LEAST_ROWS))
    return max(1, rows)


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
            other groups, nor must it be NaN while those hold 0. Called once a batch, and of
            directed rows once before.

    A gradient at an output is answered by scoring again, by ``call``'s own plan. Where
    memory runs out two passes recompute, without totals of the gradients from forward to backward,
    and the loss is called once more, with the random state of before.
    """
    device = models[0].hidden.device
    as_before = random_state(device)

    def attempt(plan: BatchedPlan | Plan) -> tuple[Tensor, Outputs]:
        as_before()
        if isinstance(plan, Plan):
            found = autograd.run(call._replace(plan=plan, straight=False), models)
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
            one_pass = _OnePass(call, plan, positions, loss, models)
            value, outputs, d_rows, gradients, projected = one_pass.run()
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


@dataclass(slots=True)
class _Sums:
    """Of gradients at the head, in the statistics' dtype (bias: float64)."""

    head: Gradients  # hidden's is none of them
    lora_a: Tensor | None = None

    def take(self, other: _Sums, length: Tensor) -> None:
        """``other`` times ``length``, and leave it empty."""
        for own, part in zip(self.head, other.head, strict=True):
            if own is not None and part is not None:
                own.addcmul_(part, length.to(part.dtype))
                part.zero_()
        if other.lora_a is not None:
            self.lora_a = _added(self.lora_a, other.lora_a * length)
            other.lora_a = None


class _OnePass:
    def __init__(
        self,
        call: Call,
        plan: BatchedPlan,
        positions: Tensor,
        loss: LossOfOutputs,
        models: Sequence[Model],
    ) -> None:
        self.call, self.plan, self.positions, self.loss = call, plan, positions, loss
        self.models, self.heads = models, call.heads(models)
        self.rule, self.directed = _rule_of(call.rule, plan), plan.largest.directed
        # Of the rows that are scored so far.
        self.outputs, self.value = self._nothing_yet(), call.target.new_zeros(())
        self.sums = _Sums(self._no_gradients())
        self.of_group = _Sums(self._no_gradients()) if plan.in_pieces else None
        self.d_rows: Tensor | None = None
        if call.request.needs_hidden:
            shape = len(positions), models[0].hidden.shape[-1]
            self.d_rows = models[0].hidden.new_empty(shape, dtype=call.plan.dtype)
        self.foreseen: Outputs = self._slopes() if self.directed else ()

    def run(self) -> Outcome:
        head, start = self.models[0].head, 0
        for pieces in self.plan.batches:
            rows = slice(start, start + sum(one.scored for one in pieces))
            if self.of_group is None or len(pieces) == 1:
                self._score(pieces[0], rows, self.sums, self._slopes)
            else:
                self._in_pieces(pieces, rows, self.of_group)
            start = rows.stop
        d_weight, d_bias = self.sums.head.weight, self.sums.head.bias
        projected = None if head.form.basis is None else d_weight
        d_head = head.by_tensor(d_weight, d_bias, self.sums.lora_a)
        return self.value, self.outputs, self.d_rows, d_head, projected

    def _in_pieces(self, pieces: Sequence[Plan], rows: slice, own: _Sums) -> None:
        """As ``_score``, of one group of directed rows, whose gradients have one length."""
        start = rows.start
        for plan in pieces:
            piece = slice(start, start + plan.scored)
            self._score(plan, piece, own, lambda: self.foreseen)
            start = piece.stop
        at = self.positions[rows]
        length = _length(_at(self._slopes(), at), _at(self.foreseen, at))
        self.sums.take(own, length)
        if self.d_rows is not None:
            self.d_rows[rows] *= length

    def _score(self, plan: Plan, rows: slice, onto: _Sums, slopes: Callable[[], Outputs]) -> None:
        """Score ``rows`` and take their gradient for the ``slopes`` at all outputs, asked for after
        that.

        A function of its own, so that what is kept is gone before that of the next batch.
        """
        at, call = self.positions[rows], self.call
        own, factor = call.target.view(-1).index_select(0, at), call.factor
        if factor is not None:
            factor = factor.view(-1).index_select(0, at)
        run = Run(self.rule, self.heads, plan)
        states = [_rows_at(one, at, plan) for one in self.models]
        direction = AlongDirection.direction(_at(self.foreseen, at)) if self.directed else None
        found, kept = forward(run, states, own, factor, direction)
        if call.tuned:
            canary.watch(call, run.heads, states[0], own, found)
        for total, part in zip(self.outputs, found, strict=True):
            if total is not None and part is not None:
                total.view(-1).index_copy_(0, at, part)
        gradients = backward(run, states, kept, _at(slopes(), at), onto.head)
        if self.d_rows is not None and gradients.hidden is not None:
            self.d_rows[rows], of_a = row_gradients(
                call, gradients.hidden, states[0], self.models[0]
            )
            onto.lora_a = _added(onto.lora_a, None if of_a is None else of_a.to(self.value.dtype))

    def _nothing_yet(self) -> Outputs:
        rule, target = self.call.rule, self.call.target
        exact = statistics_dtype(self.call.plan.dtype)
        return tuple(
            target.new_zeros(target.shape, dtype=torch.bool if name.endswith("is_top1") else exact)
            if name in rule.outputs
            else None
            for name in rule.output_names
        )

    def _no_gradients(self) -> Gradients:
        request, head = self.call.request, self.heads.projectors[0]
        d_weight = d_bias = None
        if request.needs_weight:
            shape = head.weight.shape[0], head.trained_size
            d_weight = head.weight.new_zeros(shape, dtype=statistics_dtype(head.weight.dtype))
        if request.needs_bias:
            d_bias = head.weight.new_zeros(head.weight.shape[0], dtype=torch.float64)
        return Gradients(None, d_weight, d_bias)

    def _slopes(self) -> Outputs:
        """Gradients of the loss, which is kept, at the differentiable outputs as they are now."""
        names, differentiable = self.call.rule.output_names, self.call.rule.differentiable
        with torch.enable_grad():
            given = [
                None if one is None else one.detach().requires_grad_(name in differentiable)
                for name, one in zip(names, self.outputs, strict=True)
            ]
            value = self.loss(tuple(given))
            leaves = [one for one in given if one is not None and one.requires_grad]
            slopes = iter(torch.autograd.grad(value, leaves, allow_unused=True))
        self.value = value.detach()
        return tuple(
            next(slopes) if one is not None and one.requires_grad else None for one in given
        )


def _rule_of(rule: Rule, plan: BatchedPlan) -> Rule:
    """That of the batches, for a call of ``rule``."""
    if plan.largest.directed and isinstance(rule, WithDivergence):
        return AlongDirection(rule.policy, rule.reference, rule.epsilon)
    return rule


def _at(slopes: Outputs, positions: Tensor) -> Outputs:
    """(N,) each, of all positions."""
    return tuple(
        None if one is None else one.reshape(-1).index_select(0, positions) for one in slopes
    )


def _length(slopes: Outputs, foreseen: Outputs) -> Tensor:
    """What ``foreseen``, of the same direction, is multiplied by to be ``slopes``; 0 where it is
    0."""
    products, squares = [], []
    for one, other in zip(slopes, foreseen, strict=True):
        if one is not None and other is not None:
            products.append((one.double() * other.double()).sum())
            squares.append(other.double().square().sum())
    square = torch.stack(squares).sum()
    return torch.where(square == 0, 0, torch.stack(products).sum() / square)


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
