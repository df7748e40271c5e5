# SPDX-License-Identifier: Apache-2.0
"""The passes of ``linear_divergence``: values, and gradients by matrix products.

Tiles of both heads' raw products are formed side by side and reduced to a number a row; where a
gradient is needed the student's tile becomes G, the divergence's gradient with respect to the
student's raw products. The upstream gradient g of a row only ever scales rows:

    d hidden = g (G W),   d weight = G^T (g hidden),   d bias = G^T g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import (
    by_parameter,
    like_parameters,
    once_differentiable,
    packed_rows,
    products_of,
    row_gradients,
)
from .backends.column_sums import add_column_sums
from .backends.divergences import divergence_rows
from .backward import Gradients, add_product
from .request import Parameters
from .retry import with_less
from .slab import Slab
from .two_heads import Model, Tiles, TwoHeadPlan, TwoHeads
from .types import statistics_dtype
from .workspace import give_back, lease


class Call(NamedTuple):
    heads: TwoHeads
    divergence: str
    beta: float

    def under(self, plan: TwoHeadPlan) -> Call:
        return self._replace(heads=replace(self.heads, plan=plan))

    def rows(self, student: Tensor, teacher: Tensor, tiles: Tiles, write: bool) -> Tensor:
        """(rows,); with ``write`` the student's tile becomes G."""
        return divergence_rows(
            Slab.of(tiles.student).products(student),
            Slab.of(tiles.teacher).products(teacher),
            self.divergence,
            self.beta,
            write,
            self.heads.student.plan.backend,
        )


class LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        student, teacher = models(tensors)
        out, kept, direct, plan = run_forward(call, student.detached(), teacher)
        if plan.needs_grad:
            ctx.save_for_backward(*tensors, kept, direct)
            ctx.call = call.under(plan)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept, direct = ctx.saved_tensors
        student, teacher = models(tensors)
        with torch.no_grad():
            gradients = run_backward(ctx.call, student, teacher, kept, direct, upstream)
        once = once_differentiable(gradients, (*flat(student), upstream))
        return (None, *once, *[None] * len(flat(teacher)))


class Compared(NamedTuple):
    """Of a forward pass."""

    values: Tensor  # like hidden without its last dimension
    kept: Tensor | None  # G, (kept rows, V)
    direct: Tensor | None  # G W of all rows, where only hidden needs a gradient
    plan: TwoHeadPlan  # that memory held


def run_forward(call: Call, student: Model, teacher: Model) -> Compared:
    """Values, and what backward needs; with less than planned where memory runs out."""

    def attempt(plan: TwoHeadPlan) -> Compared:
        return _forward(call.under(plan), student, teacher)

    with products_of(student.hidden):
        return with_less(attempt, call.heads.plan, call.heads.less, student.hidden.device)


def _forward(call: Call, student: Model, teacher: Model) -> Compared:
    plan, packing = call.heads.plan, call.heads.packing
    kept = direct = None
    tiles = Tiles.of(call.heads, student, teacher)
    if plan.kept_rows:
        kept = lease((plan.kept_rows, plan.vocab_size), plan.dtype, tiles.rows.device)
    if plan.schedule == "direct":
        direct = torch.empty_like(tiles.rows)
    values = [tiles.rows.new_empty(0, dtype=statistics_dtype(plan.dtype))]
    for rows in plan.chunks(0, plan.scored):
        keeps = kept is not None and rows.stop <= plan.kept_rows
        own, other = tiles.project(rows, kept[rows] if kept is not None and keeps else None)
        values.append(call.rows(own, other, tiles, write=keeps or direct is not None))
        if direct is not None:
            torch.mm(own, tiles.student.weight, out=direct[rows])
    out = packing.spread(torch.cat(values)).view(student.hidden.shape[:-1])
    return Compared(out, kept, direct, plan)


def run_backward(
    call: Call,
    student: Model,
    teacher: Model,
    kept: Tensor | None,
    direct: Tensor | None,
    upstream: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients at the student's hidden states and parameters. Where memory runs out ``kept`` is
    given back and its rows recomputed."""
    held = kept

    def attempt(plan: TwoHeadPlan) -> tuple[Tensor | None, ...]:
        return _backward(call.under(plan), student, teacher, held, direct, upstream)

    def recomputing(plan: TwoHeadPlan) -> TwoHeadPlan | None:
        nonlocal held
        if held is not None:
            give_back(held)
            held = None
        return None if direct is not None else call.heads.less(plan, keep=False)

    with products_of(student.hidden):
        return with_less(attempt, call.heads.plan, recomputing, student.hidden.device)


def _backward(
    call: Call,
    student: Model,
    teacher: Model,
    kept: Tensor | None,
    direct: Tensor | None,
    upstream: Tensor,
) -> tuple[Tensor | None, ...]:
    heads, (hidden, parameters) = call.heads, student
    exact = statistics_dtype(heads.plan.dtype)
    g = heads.packing.gather(upstream.reshape(-1).to(exact)).contiguous()
    if direct is not None:
        rows = packed_rows(heads.student, hidden, parameters)
        d_wide = heads.student.backend.scale_rows(direct, g, torch.empty_like(direct))
        gradients = Gradients(d_wide, None, None)
    else:
        tiles = Tiles.of(heads, student, teacher)
        rows, gradients = tiles.rows, _products(call, tiles, kept, g)
    d_hidden = d_a = None
    if gradients.hidden is not None:
        d_wide = gradients.hidden.masked_fill_((g == 0)[:, None], 0)
        d_rows, d_a = row_gradients(heads.student, d_wide, rows, parameters)
        d_hidden = heads.packing.spread(d_rows).view(hidden.shape).to(hidden.dtype)
    found = by_parameter(gradients, d_a, parameters)
    return d_hidden, *like_parameters(found, parameters)


def _products(call: Call, tiles: Tiles, kept: Tensor | None, g: Tensor) -> Gradients:
    """Kept rows in one product where all have a gradient, the others chunk by chunk, their G formed
    again."""
    plan, backend = call.heads.plan, call.heads.student.backend
    head, exact = tiles.student, statistics_dtype(plan.dtype)
    chunks = _chunks(plan, kept, g)
    d_hidden = d_weight = d_bias = None
    if plan.needs_hidden:
        d_hidden = torch.zeros_like(tiles.rows)
    if plan.needs_bias:
        d_bias = g.new_zeros(plan.vocab_size, dtype=torch.float64)
    if plan.needs_weight:
        shape = plan.vocab_size, head.weight.shape[1] - head.trained
        # 16-bit products of several chunks add up in float32.
        d_weight = g.new_empty(shape, dtype=plan.dtype if len(chunks) == 1 else exact)
        if not chunks:
            d_weight.zero_()
    for chunk in chunks:
        matrix = _gradient_matrix(call, tiles, kept, chunk)
        if d_weight is not None:
            own = tiles.rows[chunk.rows][:, head.trained :]
            own = backend.scale_rows(own, g[chunk.rows], torch.empty_like(own))
            add_product(d_weight, matrix.t(), own, first=chunk is chunks[0])
        if d_hidden is not None:
            part = torch.mm(matrix, head.weight)
            d_hidden[chunk.rows] = backend.scale_rows(part, g[chunk.rows], part)
        if d_bias is not None:
            add_column_sums(d_bias, matrix, g[chunk.rows])
    return Gradients(d_hidden, d_weight, d_bias)


class Chunk(NamedTuple):
    rows: slice | Tensor
    kept: bool  # whether their G is


def _chunks(plan: TwoHeadPlan, kept: Tensor | None, g: Tensor) -> list[Chunk]:
    """All rows; on the CPU, where the host can look, those with a gradient: another's G may hold
    anything."""
    inside = 0 if kept is None else kept.shape[0]
    if g.device.type != "cpu" or bool((g != 0).all()):
        whole = [Chunk(slice(0, inside), True)] if inside else []
        return whole + [Chunk(rows, False) for rows in plan.chunks(inside, plan.scored)]
    active = g.nonzero()[:, 0]
    parts = (active[active < inside], True), (active[active >= inside], False)
    return [
        Chunk(rows, held)
        for part, held in parts
        for rows in part.split(plan.tile_rows)
        if len(rows)
    ]


def _gradient_matrix(call: Call, tiles: Tiles, kept: Tensor | None, chunk: Chunk) -> Tensor:
    """G of some rows."""
    if kept is None or not chunk.kept:
        matrix, other = tiles.project(chunk.rows)
        call.rows(matrix, other, tiles, write=True)
        return matrix
    if isinstance(chunk.rows, slice):
        return kept[chunk.rows]
    return torch.index_select(kept, 0, chunk.rows, out=tiles.room[: len(chunk.rows)])


def flat(model: Model) -> tuple[Tensor | None, ...]:
    return (model.hidden, *model.parameters)


def models(tensors: Sequence[Tensor | None]) -> tuple[Model, Model]:
    """From ``flat`` student and teacher."""
    half = len(tensors) // 2
    student, teacher = tensors[:half], tensors[half:]
    return _model(*student), _model(*teacher)


def _model(hidden: Tensor | None, *parameters: Tensor | None) -> Model:
    if hidden is None:
        raise TypeError("a model without hidden states")
    return Model(hidden, Parameters(*parameters))  # type: ignore[arg-type]
