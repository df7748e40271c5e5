# SPDX-License-Identifier: Apache-2.0
"""Two heads over one vocabulary, a student's and a teacher's, whose raw products are looked at side
by side, tile by tile."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import packed_rows
from .backends import column_sums
from .backends import divergences as formulas
from .packing import Packing, pack
from .request import Call, Lora, Parameters, Request, make_request, plan_call
from .schedule import (
    GIVEN,
    LEAST_ROWS,
    MEBIBYTE,
    PRODUCT_BYTES,
    RAN_OUT,
    SHARE,
    SHORTAGE,
    Problem,
    memory_budget,
    most_chunk_rows,
)
from .types import Head, ScoringOptions, statistics_dtype
from .validation import check_two_heads
from .workspace import lease

SCORED, IGNORED = 0, -1  # pseudo-targets: positions matter here, not tokens


class Model(NamedTuple):
    """Hidden states and head."""

    hidden: Tensor
    parameters: Parameters

    def detached(self) -> Model:
        own = (None if one is None else one.detach() for one in self.parameters)
        return Model(self.hidden.detach(), Parameters._make(own))


@dataclass(frozen=True, kw_only=True)
class TwoHeadPlan:
    """Sizes and cost of a call.

    schedule: "score" without gradient, "direct" where only hidden needs one, "keep" where the
    budget holds the gradient matrix of all rows, else "recompute" for the rows beyond.
    """

    schedule: str
    scored: int  # N
    hidden_size: int
    teacher_size: int  # of its hidden states
    trained_size: int
    vocab_size: int  # V, that both have
    dtype: torch.dtype
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    tile_rows: int
    kept_rows: int
    temporary_bytes: int
    copied_bytes: int  # of weights in the products' dtype
    memory_budget: int  # bytes for tiles and kept rows
    budget_from: str = field(compare=False)  # where it comes from, in words
    backend: str
    device_type: str

    @property
    def needs_grad(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias

    @property
    def units(self) -> float:
        """Cost in u, one u being the student's product of 2 N H V flop."""
        both = 1 + self.teacher_size / self.hidden_size
        again = 0.0
        if self.needs_grad and self.schedule != "direct":
            again = 1 - self.kept_rows / max(1, self.scored)
        weight = self.trained_size / self.hidden_size if self.needs_weight else 0.0
        return both * (1 + again) + float(self.needs_hidden) + weight

    @property
    def workspace_bytes(self) -> int:
        """Working memory at its peak, results and gradients not."""
        itemsize, exact = self.dtype.itemsize, statistics_dtype(self.dtype).itemsize
        tiles = 2 * self.tile_rows * self.vocab_size * itemsize + self.temporary_bytes
        kept = self.kept_rows * self.vocab_size * itemsize
        rows = self.scored * (4 * self.hidden_size + self.teacher_size) * itemsize
        numbers = 4 * self.scored * exact
        product = 0
        if self.needs_weight and itemsize < exact:
            wide = self.vocab_size * self.trained_size
            product = wide * exact + min(wide * itemsize, PRODUCT_BYTES)
        bias = 0
        if self.needs_bias:
            shape = max(self.tile_rows, self.kept_rows), self.vocab_size
            bias = column_sums.temporary_bytes(*shape, self.device_type, self.dtype)
        return tiles + kept + rows + numbers + product + bias + self.copied_bytes

    def __str__(self) -> str:
        return (
            f"{self.schedule} of two heads on {self.backend}: {self.units:.2f}u, "
            f"workspace {self.workspace_bytes / MEBIBYTE:.1f} MiB "
            f"(budget {self.memory_budget / MEBIBYTE:.1f} MiB, {self.budget_from}), "
            f"{self.kept_rows} of {self.scored} rows kept, {self.tile_rows} rows a tile"
        )

    def chunks(self, start: int, stop: int) -> list[slice]:
        """Of the rows to be projected; none lies on both sides of the last kept row."""
        bounds = [start, min(max(start, self.kept_rows), stop), stop]
        return [
            slice(at, min(to, at + self.tile_rows))
            for since, to in itertools.pairwise(bounds)
            for at in range(since, to, self.tile_rows)
        ]


@dataclass(frozen=True)
class TwoHeads:
    """One call: of both models how they are scored, and on what schedule."""

    student: Call
    teacher: Call
    plan: TwoHeadPlan

    @property
    def packing(self) -> Packing:
        return self.student.packing

    def less(self, plan: TwoHeadPlan, keep: bool = True) -> TwoHeadPlan | None:
        """The plan to follow where memory ran out under ``plan``; None where that is the least.
        ``keep`` as in schedule.less."""
        rows = plan.kept_rows + 2 * plan.tile_rows
        budget = rows * plan.vocab_size * plan.dtype.itemsize  # what was taken of it
        recompute = not keep or (plan.schedule == "recompute" and not plan.kept_rows)
        while budget > 1:
            budget = max(1, budget // SHORTAGE)
            options = ScoringOptions(
                schedule="recompute" if recompute else "auto",
                memory_budget=budget,
                chunk_rows=plan.tile_rows,
            )
            found = _plan(self.student.plan, self.teacher.plan, options)
            if (found.kept_rows, found.tile_rows) != (plan.kept_rows, plan.tile_rows):
                return replace(found, budget_from=RAN_OUT)
        return None


@dataclass(frozen=True)
class Tiles:
    """Both models' packed rows and heads in the products' dtype, and room for a tile of each."""

    rows: Tensor  # (N, H) of the student
    teacher_rows: Tensor
    student: Head
    teacher: Head
    room: Tensor  # (2 tile rows, V)

    @classmethod
    def of(cls, heads: TwoHeads, student: Model, teacher: Model) -> Tiles:
        rows = packed_rows(heads.student, *student)
        shape = 2 * heads.plan.tile_rows, heads.plan.vocab_size
        return cls(
            rows,
            packed_rows(heads.teacher, *teacher),
            heads.student.head(student.parameters),
            heads.teacher.head(teacher.parameters),
            lease(shape, rows.dtype, rows.device),
        )

    def project(self, rows: slice | Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw products of some rows, the student's into ``out`` where given."""
        own, others = self.rows[rows], self.teacher_rows[rows]
        count, half = own.shape[0], self.room.shape[0] // 2
        student = self.room[:count] if out is None else out
        teacher = self.room[half : half + count]
        torch.mm(own, self.student.weight.t(), out=student)
        torch.mm(others, self.teacher.weight.t(), out=teacher)
        return student, teacher


class Question(NamedTuple):
    """What is asked of two heads, checked; all but which positions are scored."""

    student: Request
    teacher: Request
    target: Tensor  # (...) SCORED or IGNORED

    def heads(self, student: Model, teacher: Model, traced: bool = False) -> TwoHeads:
        """The schedule; ``traced`` keeps it from asking a GPU for the scored positions."""
        options = self.student.options
        packing = pack(self.target, IGNORED, options.max_scored, bounded=traced)
        # The schedules of a single head mean something else.
        alone = replace(options, schedule="auto")
        ours, theirs = (
            # What is tuned is the product of one head.
            plan_call(replace(request, options=alone), *model, self.target, packing, tuned=False)
            for request, model in ((self.student, student), (self.teacher, teacher))
        )
        return TwoHeads(ours, theirs, _plan(ours.plan, theirs.plan, options))


def ask_two_heads(
    student: tuple[Tensor, Tensor, Tensor | None, Lora | None],
    teacher: tuple[Tensor, Tensor, Tensor | None, Lora | None],
    mask: Tensor | None,
    *,
    options: ScoringOptions | None,
    **map: Any,
) -> tuple[Question, Model, Model]:
    """(hidden, weight, bias, lora) of each, checked.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    hidden, weight = student[:2]
    check_two_heads(hidden, weight, *teacher[:2], mask)
    target = torch.full(hidden.shape[:-1], SCORED, dtype=torch.int64, device=hidden.device)
    if mask is not None:
        target = target.masked_fill(~mask, IGNORED)
    columns, others = weight.shape[0], teacher[1].shape[0]
    common = None if columns == others else (0, min(columns, others))
    asked, recording = [], torch.is_grad_enabled()
    for prefix, (own, head, bias, lora) in (("student_", student), ("teacher_", teacher)):
        with torch.set_grad_enabled(recording and prefix == "student_"):
            request, parameters = make_request(
                own,
                head,
                target,
                bias=bias,
                lora=lora,
                ignore_index=IGNORED,
                vocab_range=common,
                options=options,
                prefix=prefix,
                **map,
            )
        asked.append((request, Model(own, parameters)))
    (ours, model), (theirs, other) = asked
    trains = ours.needs_weight or ours.needs_bias
    chosen = ours.options.schedule
    if chosen == "batches" or (chosen == "direct" and trains):
        raise ValueError(
            f"schedule={chosen!r} does not serve two heads"
            f"{', of which one is trained' if chosen == 'direct' else ''}; use schedule='auto', "
            "'keep' or 'recompute'"
        )
    reason = formulas.unavailable_reason(ours.options.backend)
    if reason is not None:
        raise ValueError(f"backend={ours.options.backend!r} is not available: {reason}")
    dtype = torch.promote_types(ours.dtype, theirs.dtype)
    question = Question(replace(ours, dtype=dtype), replace(theirs, dtype=dtype), target)
    return question, model, other.detached()


def _plan(student: Problem, teacher: Problem, options: ScoringOptions) -> TwoHeadPlan:
    vocab = student.vocab_size
    budget, row = memory_budget(student, options), max(1, vocab * student.itemsize)
    trains = student.needs_weight or student.needs_bias
    if not student.needs_grad:
        schedule = "score"
    else:
        schedule = "keep" if trains else "direct"
    # Two tiles, beside kept rows in a quarter of the budget.
    share = budget // 4 if schedule == "keep" else budget
    wanted = most_chunk_rows(student, options.chunk_rows)
    tile_rows = min(wanted, max(LEAST_ROWS, share // (2 * row)))
    kept = 0
    if schedule == "keep" and options.schedule != "recompute":
        kept = min(student.scored, max(0, budget - 2 * tile_rows * row) // row)
    if schedule == "keep" and kept < student.scored:
        schedule = "recompute"
    copies = sum(
        vocab * one.hidden_size * one.itemsize for one in (student, teacher) if one.copies_weight
    )
    return TwoHeadPlan(
        schedule=schedule,
        scored=student.scored,
        hidden_size=student.hidden_size,
        teacher_size=teacher.hidden_size,
        trained_size=student.trained_size,
        vocab_size=vocab,
        dtype=student.dtype,
        needs_hidden=student.needs_hidden,
        needs_weight=student.needs_weight,
        needs_bias=student.needs_bias,
        tile_rows=tile_rows,
        kept_rows=kept,
        temporary_bytes=formulas.temporary_bytes(
            tile_rows, vocab, student.device_type, student.dtype, student.backend
        ),
        copied_bytes=copies,
        memory_budget=budget,
        budget_from=SHARE if options.memory_budget is None else GIVEN,
        backend=student.backend,
        device_type=student.device_type,
    )
