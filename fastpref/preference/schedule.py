# SPDX-License-Identifier: Apache-2.0
"""How a call of ``preference_loss`` runs.

Two passes (scoring/schedule.py) always can. Batches of whole groups in one pass
(scoring/batches.py) need a loss that is a sum over groups of rows: an objective of scope unit, pair
or list, reduced to a number, on rows of at most one group each, where nothing beside hidden states
and head needs a gradient, and group sizes that the host knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..scoring.batches import BatchedPlan, choose_for_groups
from ..scoring.packing import Packing, pack
from ..scoring.request import Call, make_problem, plan_call
from ..scoring.schedule import MEBIBYTE, Plan
from .comparison import Projection
from .filling import differentiable_fillings
from .layouts import Indexed
from .task import Task


@dataclass(frozen=True)
class Schedule:
    policy: Call  # in two passes
    reference: Call | None
    batches: BatchedPlan | None = None  # in one pass
    positions: Tensor | None = None  # (N,) of the target, in the order of the batches

    @property
    def explanation(self) -> PreferencePlan:
        reference = None if self.reference is None else self.reference.plan
        return PreferencePlan(self.batches or self.policy.plan, reference)


@dataclass(frozen=True)
class PreferencePlan:
    """What ``explain`` returns for a call of ``preference_loss``."""

    policy: Plan | BatchedPlan
    reference: Plan | None

    @property
    def schedule(self) -> str:
        return self.policy.schedule

    @property
    def units(self) -> float:
        """Cost in u of both models, one u being a product of 2 N H V flop of the policy's."""
        if self.reference is None:
            return self.policy.units
        own = self.policy.largest if isinstance(self.policy, BatchedPlan) else self.policy
        size = own.hidden_size * own.vocab_size
        ref_size = self.reference.hidden_size * self.reference.vocab_size
        return self.policy.units + self.reference.units * ref_size / size

    @property
    def workspace_bytes(self) -> int:
        """Working memory at its peak, results and gradients not. The reference is scored first and
        leaves seven numbers a row."""
        if self.reference is None:
            return self.policy.workspace_bytes
        policy = self.policy.workspace_bytes + self.reference.saved_bytes
        return max(policy, self.reference.workspace_bytes)

    def __str__(self) -> str:
        total = f"{self.units:.2f}u, workspace {self.workspace_bytes / MEBIBYTE:.1f} MiB"
        if self.reference is None:
            return f"{total}; policy: {self.policy}"
        return f"{total}; policy: {self.policy}; reference: {self.reference}"


def schedule(task: Task) -> Schedule:
    request, batch = task.policy.request, task.batch
    lengths = _lengths(task) if _is_sum_over_groups(task) else None
    target = batch.target.to(torch.int64)
    packing = pack(
        target,
        request.ignore_index,
        request.options.max_scored,
        None if lengths is None else sum(lengths),
    )
    policy = _planned(task.policy, target, packing)
    reference = None if task.reference is None else _planned(task.reference, target, packing)
    problem = make_problem(*task.policy, packing.scored, policy.shard)
    rows = None if lengths is None else _rows_by_group(task)
    sizes = None
    if rows is not None and lengths is not None:
        sizes = [sum(lengths[row] for row in group) for group in rows]
    plan = choose_for_groups(problem, policy.plan, request.options, sizes)
    if not isinstance(plan, BatchedPlan) or rows is None or lengths is None:
        return Schedule(policy, reference)
    return Schedule(policy, reference, plan, _positions(packing, lengths, rows, target.device))


def _planned(projection: Projection, target: Tensor, packing: Packing) -> Call:
    request, hidden, parameters = projection
    if request.options.schedule == "batches":
        request = replace(request, options=replace(request.options, schedule="auto"))
    return plan_call(request, hidden, parameters, target, packing)


def _is_sum_over_groups(task: Task) -> bool:
    given = [*task.extras.values(), task.token_weights, task.denominator]
    return (
        task.objective.scope in ("unit", "pair", "list")
        and task.reduction != "none"
        and task.policy.request.needs_grad
        and task.batch.seq_group is None
        and not isinstance(task.arrangement, Indexed)
        and not any(isinstance(one, Tensor) and one.requires_grad for one in given)
        and not differentiable_fillings(task.objective, task.extras)
    )


def _lengths(task: Task) -> list[int] | None:
    """Scored tokens of each row; None where the host would wait for the device to learn more than
    their number, or where some tokens are in no row."""
    batch, options = task.batch, task.policy.request.options
    bounded = batch.cu_seqlens is not None or options.max_scored is not None
    if batch.target.is_cuda and (bounded or torch.cuda.is_current_stream_capturing()):
        return None
    lengths: list[int] = batch.lengths.tolist()
    if batch.cu_seqlens is not None and sum(lengths) != int(batch.scored.sum()):
        return None
    return lengths


def _rows_by_group(task: Task) -> list[list[int]]:
    rows = torch.arange(task.batch.rows)
    groups: list[list[int]] = torch.stack(task.arrangement.split(rows), -1).flatten(1).tolist()
    return groups


def _positions(
    packing: Packing, lengths: list[int], rows: list[list[int]], device: torch.device
) -> Tensor:
    """The scored positions, those of a group together."""
    length = torch.tensor(lengths)
    order = torch.tensor([row for group in rows for row in group])
    starts = (length.cumsum(0) - length)[order]
    own = length[order]
    shift = starts - (own.cumsum(0) - own)
    index = torch.arange(packing.scored) + shift.repeat_interleave(own)
    index = index.to(device)
    return index if packing.positions is None else packing.positions[index]
