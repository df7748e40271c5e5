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
from .autograd import once_differentiable, products_of, row_gradients
from .backward import Gradients, backward
from .forward import Run, forward
from .head import TENSORS, Model
from .plan import MEBIBYTE, Plan, choose, less, rows_to_keep
from .request import Call
from .retry import nothing_less, random_state, with_less
from .rules import Heads
from .statistics import TokenScores
from .types import ScoringOptions, statistics_dtype

# Rows of a product that take as long as adding a product onto (V, H) float32 totals: measured on
# two cores; by bandwidth and peak of an H200.
ACCUMULATION_ROWS = {"cpu": 100, "cuda": 700}

LossOfScores = Callable[[TokenScores], Tensor]
# The loss, all scores, the gradient at the rows of the positions, and at the head's tensors.
Outcome = tuple[Tensor, TokenScores, Tensor | None, tuple[Tensor | None, ...]]


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
        rows = sum(plan.units * plan.scored for plan in self.plans)
        return (rows + self._accumulation_rows) / max(1, self.scored)

    @property
    def _accumulation_rows(self) -> float:
        plan = self.plans[0]
        if not plan.needs_weight or len(self.plans) == 1:
            return 0.0
        share = plan.trained_size / plan.hidden_size
        return ACCUMULATION_ROWS.get(plan.device_type, 0) * len(self.plans) * share

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
        )


def choose_for_groups(
    plan: Plan, options: ScoringOptions, groups: Sequence[int] | str
) -> Plan | BatchedPlan:
    """Batches where they cost less than ``plan``, the best for two passes.

    Args:
        groups: scored rows of each group, in the order of the batches; or why there are none.

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
    best = plan.schedule == "direct" or plan.kept_rows == plan.scored
    if not forced and (options.schedule != "auto" or best):
        return plan
    batched = BatchedPlan(plans=tuple(_plans(plan, options, groups)))
    return batched if forced or batched.units < plan.units else plan


def _plans(whole: Plan, options: ScoringOptions, groups: Sequence[int]) -> Iterator[Plan]:
    options = replace(options, schedule="keep")
    capacity = max(1, rows_to_keep(whole, whole.memory_budget))
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
    loss: LossOfScores,
    model: Model,
) -> tuple[Tensor, TokenScores]:
    """The loss, and the scores it is of.

    Args:
        positions: (N,) scored positions of the target, those of a group together, in the order of
            the plan's batches.
        loss: of the scores to a 0-dim tensor; the gradient at a group's log-probabilities must not
            depend on other groups, nor must it be NaN while those hold 0. Called once a batch.

    A gradient at the scores' ``logp`` is answered by scoring again, by ``call``'s own plan. Where
    memory runs out two passes recompute, without totals of the gradients from forward to backward,
    and the loss is called once more, with the random state of before.
    """
    device = model.hidden.device
    as_before = random_state(device)

    def attempt(plan: BatchedPlan | Plan) -> tuple[Tensor, TokenScores]:
        as_before()
        if isinstance(plan, Plan):
            found = TokenScores._make(autograd.run(replace(call, plan=plan), [model]))
            return loss(found), found
        value, *scores = BatchedLoss.apply(call, plan, positions, loss, *model.tensors)  # type: ignore[no-untyped-call]
        return value, TokenScores._make(scores)

    def two_passes(plan: BatchedPlan | Plan) -> Plan | None:
        # Which take less themselves where that is not enough.
        return None if isinstance(plan, Plan) else less(call.plan, keep=False) or call.plan

    planned: BatchedPlan | Plan = plan
    return with_less(attempt, planned, two_passes, device, call.group)


class BatchedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        plan: BatchedPlan,
        positions: Tensor,
        loss: LossOfScores,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        model = Model.of(tensors, call.forms[0])
        with products_of(model.hidden):
            one_pass = _OnePass(call, plan, positions, loss)
            value, scores, d_rows, gradients = one_pass.run(model.detached())
        ctx.call, ctx.plan = call, plan
        ctx.save_for_backward(*tensors, positions, d_rows, *gradients)
        named = scores._asdict().items()
        ctx.mark_non_differentiable(
            *(one for name, one in named if one is not None and name != "logp")
        )
        return value, *scores

    @staticmethod
    def backward(
        ctx: Any, d_loss: Tensor | None, *d_scores: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        tensors, (positions, d_rows, *d_head) = saved[:TENSORS], saved[TENSORS:]
        model = Model.of(tensors, call.forms[0])
        hidden = model.hidden

        def scaled(plan: BatchedPlan) -> list[Tensor | None]:
            if d_loss is None:
                return [None] * TENSORS
            rows = None if d_rows is None else _spread(d_rows * d_loss, positions, hidden)
            pairs = zip(d_head, model.head.tensors, strict=True)
            return [rows, *(_scaled(one, d_loss, own) for one, own in pairs)]

        with torch.no_grad():
            gradients = with_less(scaled, ctx.plan, nothing_less, hidden.device, call.group)
            if any(one is not None for one in d_scores):
                _, kept, heads, plan = autograd.run_forward(call, [model])
                again = replace(call, plan=plan)
                more = autograd.run_backward(again, [model], kept, d_scores, heads)

                def added(plan: Plan) -> list[Tensor | None]:
                    return [_added(a, b) for a, b in zip(gradients, more, strict=True)]

                gradients = with_less(added, call.plan, nothing_less, hidden.device, call.group)
        depends_on = (*tensors, d_loss, *d_scores)
        return (None, None, None, None, *once_differentiable(gradients, depends_on))


@dataclass(frozen=True)
class _OnePass:
    call: Call
    plan: BatchedPlan
    positions: Tensor
    loss: LossOfScores

    def run(self, model: Model) -> Outcome:
        call, flat = self.call, model.hidden.reshape(-1, model.hidden.shape[-1])
        heads, scores = call.heads([model]), self._no_scores()
        totals, d_a, d_rows = self._totals(heads), None, None
        if call.request.needs_hidden:
            d_rows = flat.new_empty((len(self.positions), flat.shape[1]), dtype=call.plan.dtype)
        value, start = call.target.new_zeros(()), 0
        for plan in self.plan.plans:
            at = self.positions[start : start + plan.scored]
            rows = model.head.widened(flat.index_select(0, at).to(plan.dtype))
            run = Run(call.rule, heads, plan)
            value, gradients = self._batch(run, rows, at, scores, totals)
            if d_rows is not None and gradients.hidden is not None:
                d_rows[start : start + plan.scored], d_a_part = row_gradients(
                    call, gradients.hidden, rows, model
                )
                d_a = _added(d_a, None if d_a_part is None else d_a_part.to(value.dtype))
            start += plan.scored
        return value, scores, d_rows, model.head.by_tensor(totals.weight, totals.bias, d_a)

    def _batch(
        self, run: Run, rows: Tensor, at: Tensor, scores: TokenScores, totals: Gradients
    ) -> tuple[Tensor, Gradients]:
        """The loss of all scores so far and the gradient at ``rows``; theirs go into ``scores``.

        A function of its own, so that the exponentials are gone before those of the next batch.
        """
        own = self.call.target.view(-1).index_select(0, at)
        found, kept = forward(run, [rows], own)
        canary.watch(self.call, run.heads, rows, own, found)
        for total, part in zip(scores, found, strict=True):
            if total is not None and part is not None:
                total.view(-1).index_copy_(0, at, part)
        value, slope = self._loss_and_slope(scores)
        upstream = TokenScores(logp=slope.view(-1).index_select(0, at))
        return value, backward(run, [rows], kept, upstream, totals)

    def _no_scores(self) -> TokenScores:
        rule, target = self.call.rule, self.call.target
        exact = statistics_dtype(self.call.plan.dtype)
        return TokenScores(
            **{
                name: target.new_zeros(
                    target.shape, dtype=torch.bool if name == "is_top1" else exact
                )
                for name in rule.outputs
            }
        )

    def _totals(self, heads: Heads) -> Gradients:
        request, head = self.call.request, heads.projectors[0]
        d_weight = d_bias = None
        if request.needs_weight:
            shape = head.weight.shape[0], head.weight.shape[1] - head.trained
            d_weight = head.weight.new_zeros(shape, dtype=statistics_dtype(head.weight.dtype))
        if request.needs_bias:
            d_bias = head.weight.new_zeros(head.weight.shape[0], dtype=torch.float64)
        return Gradients(None, d_weight, d_bias)

    def _loss_and_slope(self, scores: TokenScores) -> tuple[Tensor, Tensor]:
        if scores.logp is None:
            raise RuntimeError("logp was not asked for")
        with torch.enable_grad():
            logp = scores.logp.detach().requires_grad_()
            value = self.loss(scores._replace(logp=logp))
            (slope,) = torch.autograd.grad(value, logp)
        return value.detach(), slope


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
