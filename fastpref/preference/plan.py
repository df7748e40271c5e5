# SPDX-License-Identifier: Apache-2.0
"""How a call of ``preference_loss`` runs.

Two passes (scoring/plan.py) always can. Batches of whole groups in one pass
(scoring/batches.py) need a loss that is a sum over groups of rows, all those that comparisons
connect: an objective of scope unit, pair or list, reduced to a number, where nothing beside hidden
states and head needs a gradient, and group sizes that the host knows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..scoring.api import Asked
from ..scoring.autograd import Outputs
from ..scoring.batches import BatchedPlan, choose_for_groups
from ..scoring.packing import Packing
from ..scoring.plan import MEBIBYTE, Plan
from ..scoring.request import Call, pack_for
from ..scoring.rules.compared import WithDivergence
from ..units.layouts import Arrangement, Indexed
from .batch import Batch
from .result import result_of
from .task import Task


@dataclass(frozen=True)
class PreferenceCall:
    main: Call  # in two passes
    reference: Call | None  # before it
    batches: BatchedPlan | None = None  # in one pass
    positions: Tensor | None = None  # (N,) of the target, in the order of the batches

    @property
    def explanation(self) -> PreferencePlan:
        reference = None if self.reference is None else self.reference.plan
        return PreferencePlan(self.batches or self.main.plan, reference)


@dataclass(frozen=True)
class PreferencePlan:
    """What ``explain`` returns for a call of ``preference_loss``."""

    policy: Plan | BatchedPlan  # or of both models side by side
    reference: Plan | None  # scored before

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


def plan_task(task: Task) -> PreferenceCall:
    request, target = task.main.request, task.batch.to_score.to(torch.int64)
    groups = _groups(task)
    # Elsewhere the host knows it as it is.
    count = sum(groups.lengths) if isinstance(groups, Groups) and target.is_cuda else None
    packing = pack_for(request, target, count)
    main = _planned(task.main, target, packing, _active(task))
    reference = None if task.reference is None else _planned(task.reference, target, packing)
    sizes = groups if isinstance(groups, str) else groups.sizes
    directed = isinstance(groups, Groups) and _directed(task)
    plan = choose_for_groups(main.plan, request.options, sizes, directed)
    if isinstance(plan, BatchedPlan) and _trains_more(task):
        reason = "the objective has parameters that need a gradient"
        plan = choose_for_groups(main.plan, request.options, reason)
    if isinstance(groups, str) or not isinstance(plan, BatchedPlan):
        return PreferenceCall(main, reference)
    return PreferenceCall(main, reference, plan, groups.positions(packing, target.device))


@dataclass(frozen=True)
class Groups:
    """Rows that an objective compares with each other, and no others."""

    arrangement: Arrangement
    batch: Batch

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row that are scored."""
        lengths: list[int] = self.batch.counts().tolist()
        return lengths

    @functools.cached_property
    def rows(self) -> list[list[int]]:
        """Of each group."""
        every = torch.arange(len(self.lengths), dtype=torch.int64, device="cpu")
        compared = torch.stack(self.arrangement.split(every), -1).flatten(1)
        return _connected(compared.tolist(), len(self.lengths))

    def sizes(self) -> list[int]:
        """Scored tokens of each group."""
        return [sum(self.lengths[row] for row in group) for group in self.rows]

    def positions(self, packing: Packing, device: torch.device) -> Tensor:
        """The scored positions, those of a group together."""
        host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
        length = torch.tensor(self.lengths, **host)
        order = torch.tensor([row for group in self.rows for row in group], **host)
        own = length[order]
        shift = (length.cumsum(0) - length)[order] - (own.cumsum(0) - own)
        index = torch.arange(packing.scored, **host) + shift.repeat_interleave(own)
        index = index.to(device)
        return index if packing.positions is None else packing.positions[index]


def _groups(task: Task) -> Groups | str:
    """The groups, or why the loss is no sum over groups whose sizes the host knows."""
    reason = _why_no_groups(task)
    if reason is not None:
        return reason
    batch, options = task.batch, task.main.request.options
    bounded = batch.cu_seqlens is not None or options.max_scored is not None
    if batch.target.is_cuda and (bounded or torch.cuda.is_current_stream_capturing()):
        return "the host would wait for the GPU to learn the lengths of the rows"
    groups = Groups(task.arrangement, batch)
    if batch.cu_seqlens is not None and sum(groups.lengths) != int(batch.weighed.sum()):
        return "some scored tokens are in no row"
    return groups


def _connected(compared: list[list[int]], rows: int) -> list[list[int]]:
    """The rows that are connected by ``compared``, which may name a row several times or not at
    all, in the order of their first ones."""
    groups = [[row] for row in range(rows)]
    group_of = list(range(rows))
    for first, *others in compared:
        for row in others:
            own, other = sorted((group_of[first], group_of[row]))
            if own != other:
                for moved in groups[other]:
                    group_of[moved] = own
                groups[own] += groups[other]
                groups[other] = []
    return [one for one in groups if one]


def _why_no_groups(task: Task) -> str | None:
    request, objective = task.main.request, task.objective
    if request.whole:
        return "the lengths of the rows are not known"
    if not request.needs_grad:
        return "nothing needs a gradient"
    if objective.scope not in ("unit", "pair", "list"):
        return f"{objective.name} has scope {objective.scope}"
    if task.given.reduction == "none":
        return "each loss may have a gradient of its own, with reduction='none'"
    if task.batch.seq_group is not None:
        return "the tokens of a row lie on several ranks"
    basis = task.main.models[0].head.form.basis
    if basis is not None and basis.measured:
        return "columns are measured of the whole gradient, not of a batch's"
    arrangement = task.arrangement
    if isinstance(arrangement, Indexed) and arrangement.pairs.device.type != "cpu":
        return "the host would wait for the GPU to learn the pairs of an index layout"
    if request.dtype == torch.float16:
        # A loss scaler's factor arrives in backward.
        return "gradients in float16 would underflow before they are scaled"
    given = {name: getattr(task.given, name) for name in ("token_weights", "denominator")}
    given = {**task.extras, **given}
    trained = [n for n, one in given.items() if isinstance(one, Tensor) and one.requires_grad]
    return f"{', '.join(trained)} need a gradient too" if trained else None


def _directed(task: Task) -> bool:
    """Whether each group's gradient at the scores of both models has a direction that is known
    before them."""
    if not isinstance(task.main.rule, WithDivergence) or not task.objective.fixed_direction:
        return False
    arrangement = task.arrangement
    if not isinstance(arrangement, Indexed):
        return True
    # Several pairs of one row make several directions.
    rows = arrangement.pairs.flatten()
    return len(rows.unique()) == len(rows)


def _trains_more(task: Task) -> bool:
    """Whether the loss has a gradient beside that of the outputs of scoring."""
    target = task.batch.target

    def nothing(asked: Asked) -> Outputs:
        empty = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
        names, outputs = asked.rule.output_names, asked.rule.outputs
        return tuple(empty if name in outputs else None for name in names)

    reference = None if task.reference is None else nothing(task.reference)
    with torch.enable_grad():
        return result_of(task, nothing(task.main), reference).loss.requires_grad


def _active(task: Task) -> float:
    """The share of this rank's weighed tokens that the objective gives a gradient."""
    registration = task.objective.registration
    on_cpu = task.batch.target.device.type == "cpu"
    if registration is None or registration.trains_rejected or not on_cpu:
        return 1.0
    if task.main.request.whole:
        return 1.0
    chosen, _ = task.arrangement.split(replace(task.batch, seq_group=None).counts())
    return int(chosen.sum()) / max(1, int(task.batch.weighed.sum()))


def in_two_passes(asked: Asked) -> Asked:
    """With a schedule that does so, where batches are asked for."""
    options = asked.request.options
    if options.schedule != "batches":
        return asked
    options = replace(options, schedule="auto")
    return asked._replace(request=replace(asked.request, options=options))


def _planned(asked: Asked, target: Tensor, packing: Packing, active: float = 1.0) -> Call:
    return in_two_passes(asked).planned(target, packing, active)
