# SPDX-License-Identifier: Apache-2.0
"""The backward pass: matrix products over row groups, one slab of the vocabulary at a time.

With K the kept matrices of a rule and c their factors of each row, D is the sum of c K, and for a
single matrix

    d hidden = c (K W),   d weight = K^T (c hidden),   d bias = K^T c,

so that only rows of (N, H) matrices are scaled. Rows that were not kept, and all where the matrices
do not hold what is asked for, have D formed again. Where the weight's gradient is projected on a
basis, hidden in it is (N, r) instead (basis.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._extension import ops_unavailable_reason
from .backends.column_sums import add_column_sums
from .forward import Kept, Run
from .plan import Tile
from .products import add_product, cut, split
from .rules import Part, Upstream
from .scaled import add_scaled, scaled
from .types import in_dtype, statistics_dtype
from .workspace import lease, row_stride, tile_of


class Gradients(NamedTuple):
    """With respect to hidden (N, H), the weight's trained columns (V, H) and the bias added to raw
    products, (V,)."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    norms: Tensor | None = None  # (m,), what is measured beside a basis


class RowGroup(NamedTuple):
    """Rows whose tiles come from one place."""

    rows: slice
    tile: Callable[[slice, Tensor], Tensor]  # (columns, flat workspace) -> (rows, columns)
    hidden: Tensor  # (rows, trained columns), scaled by the factor where the tile is not
    factor: Tensor | None  # (rows,), where the tile is not scaled by it


def backward(
    run: Run,
    rows: Sequence[Tensor],
    kept: Kept,
    upstream: Upstream,
    onto: Gradients | torch.dtype,
) -> Gradients:
    """Gradients of the first model in the dtype of its rows (bias: float64); that of the weight in
    the dtype ``onto``, or those of weight and bias added ``onto`` totals in the statistics' dtype
    (bias: float64)."""
    hidden, apart = rows[0], None
    run = run._replace(heads=run.heads.with_factor(kept.factor))
    if run.heads.mean is not None:
        at = run.rule.output_names.index("mean_logits")
        apart, upstream = upstream[at], [*upstream[:at], None, *upstream[at + 1 :]]
    if any(one is not None for one in upstream):
        gradients = _through_logits(run, rows, kept, upstream, onto)
    else:
        gradients = _nothing(run, hidden, onto)
    if apart is not None and run.heads.mean is not None:
        head = run.heads.projectors[0]
        if kept.factor is not None:
            apart = torch.where(apart == 0, 0, apart * kept.factor)
        trained = head.trained_rows(hidden, run.heads.room)
        run.heads.mean.add_gradients(apart, trained, head.bias, *gradients[:3])
    return gradients


def _nothing(run: Run, hidden: Tensor, onto: Gradients | torch.dtype) -> Gradients:
    """Gradients of 0, or the totals."""
    plan, head = run.plan, run.heads.projectors[0]
    d_hidden = torch.zeros_like(hidden) if plan.needs_hidden else None
    if isinstance(onto, Gradients):
        return onto._replace(hidden=d_hidden)
    columns = head.weight.shape[0]
    d_weight = d_bias = None
    if plan.needs_weight:
        d_weight = hidden.new_zeros((columns, head.trained_size), dtype=onto)
    if plan.needs_bias:
        d_bias = hidden.new_zeros(columns, dtype=torch.float64)
    return Gradients(d_hidden, d_weight, d_bias)


def _through_logits(
    run: Run,
    rows: Sequence[Tensor],
    kept: Kept,
    upstream: Upstream,
    onto: Gradients | torch.dtype,
) -> Gradients:
    """``backward`` of outputs that are made of each row's logits."""
    hidden = rows[0]
    if kept.direct:
        factors = run.rule.factors(run.heads, kept.numbers, upstream)
        if factors is None:
            raise RuntimeError("a gradient arrived that no schedule of this kind serves")
        d_hidden = _combined(run, kept.direct, factors)
        without = ~active_rows(upstream)[:, None]
        return Gradients(d_hidden.masked_fill_(without, 0), None, None)
    # Two heads side by side have collectives in backward, which must not depend on what is 0.
    skips = hidden.device.type == "cpu" and (run.heads.group is None or run.rule.models == 1)
    active = _indices_of_active(upstream) if skips else None
    gradients = _products(run, rows, kept, upstream, active, onto)
    if gradients.hidden is None or active is None:
        return gradients
    d_hidden = torch.zeros_like(hidden).index_copy_(0, active, gradients.hidden)
    return gradients._replace(hidden=d_hidden)


def active_rows(upstream: Upstream) -> Tensor:
    """(N,) bool, rows with any gradient."""
    return torch.stack([one != 0 for one in upstream if one is not None]).any(0)


def _indices_of_active(upstream: Upstream) -> Tensor | None:
    """Indices of rows with any gradient; None when all have one."""
    some = [one for one in upstream if one is not None]
    if len(some) == 1 and ops_unavailable_reason() is None:
        places, count = torch.ops.fastpref.nonzero_places(some[0])
        return None if count == some[0].shape[0] else places
    active = active_rows(upstream)
    return None if bool(active.all()) else active.nonzero()[:, 0]


def _combined(run: Run, matrices: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Their sum, each row scaled by its factor, (rows, columns)."""
    first, *others = matrices[: len(factors)]
    total = run.heads.backend.scale_rows(first, factors[0], torch.empty_like(first))
    for matrix, factor in zip(others, factors[1:], strict=True):
        add_scaled(total, matrix, factor)
    return total


class _Groups(NamedTuple):
    groups: list[RowGroup]  # kept rows first
    tile: Tile  # that all but kept rows read in place are worked through in


def _row_groups(
    run: Run, rows: Sequence[Tensor], kept: Kept, upstream: Upstream, active: Tensor | None
) -> _Groups:
    """Of ``rows``, whose positions among all rows are ``active``; None: they are all."""
    plan, total, vocab = run.plan, rows[0].shape[0], run.heads.projectors[0].weight.shape[0]
    factors = run.rule.factors(run.heads, kept.numbers, upstream)
    inside = 0
    if factors is not None:
        inside = kept.rows if active is None else int((active < kept.rows).sum())
    # Kept rows that all have a gradient are read where they lie.
    in_place = active is None and factors is not None and len(factors) == 1
    gathered = 0 if in_place else inside
    tile = Tile(0, vocab)
    if gathered or inside < total:
        tile = plan.backward_room(
            max(gathered, total - inside), vocab, kept.rows, beside=0 < inside < total
        )
    trained = rows[0]
    if plan.needs_weight:
        trained = run.heads.projectors[0].trained_rows(trained, run.heads.room)
    groups = []

    def add(at: slice, source: Callable[[slice, Tensor], Tensor], factor: Tensor | None) -> None:
        own = cut(trained, at)
        if plan.needs_weight and factor is not None:
            own = run.heads.backend.scale_rows(own, factor, torch.empty_like(own))
        groups.append(RowGroup(at, source, own, factor))

    def chosen(at: slice) -> slice | Tensor:
        return at if active is None else active[at]

    if in_place and factors is not None and inside:
        at = slice(0, inside)
        add(at, _where_it_lies(kept.matrices[0]), cut(factors[0], at))
    for at in split(0, gathered, tile.rows):
        if factors is not None:
            where = chosen(at)
            add(at, *_kept_tile(kept.matrices, where, [one[where] for one in factors]))
    for at in split(inside, total, tile.rows):
        where = chosen(at)
        numbers, given = (
            [None if one is None else one[where] for one in some]
            for some in (kept.numbers, upstream)
        )
        part = Part([one[at] for one in rows], kept.target[where])
        add(at, *run.rule.again(run.heads.of_rows(where), part, numbers, given))
    return _Groups(groups, tile)


def _where_it_lies(matrix: Tensor) -> Callable[[slice, Tensor], Tensor]:
    """The tile of rows that are all of ``matrix``."""
    every = slice(0, matrix.shape[0])
    return lambda columns, _: cut(matrix, every, columns)


def _kept_tile(
    matrices: Sequence[Tensor], chosen: slice | Tensor, factors: Sequence[Tensor]
) -> tuple[Callable[[slice, Tensor], Tensor], Tensor]:
    """Where the tile of some kept rows comes from, and its factor."""
    matrix, *others = matrices[: len(factors)]
    # The largest is taken out, so that no number of a tile underflows because another is small.
    factor = factors[0] if not others else torch.stack([one.abs() for one in factors]).amax(0)

    def of(one: Tensor, columns: slice, room: Tensor | None) -> Tensor:
        if isinstance(chosen, slice):
            return one[chosen, columns]
        return torch.index_select(one[:, columns], 0, chosen, out=room)

    def tile(columns: slice, workspace: Tensor) -> Tensor:
        rows = factor.shape[0]
        if not others:
            room = None if isinstance(chosen, slice) else tile_of(workspace, rows, columns)
            return of(matrix, columns, room)
        half = workspace.shape[0] // 2
        out, room = (tile_of(one, rows, columns) for one in (workspace[:half], workspace[half:]))
        shares = [torch.where(factor == 0, 0.0, one / factor) for one in factors]
        scaled(of(matrix, columns, room), shares[0], out)
        for one, share in zip(others, shares[1:], strict=True):
            add_scaled(out, of(one, columns, room), share)
        return out

    return tile, factor


def _products(
    run: Run,
    rows: Sequence[Tensor],
    kept: Kept,
    upstream: Upstream,
    active: Tensor | None,
    onto: Gradients | torch.dtype,
) -> Gradients:
    """All products, slab by slab; each slab of d weight is written once. That of hidden is of the
    ``active`` rows."""
    if active is not None:
        rows = [one[active] for one in rows]
    groups, tile = _row_groups(run, rows, kept, upstream, active)
    plan, hidden, head = run.plan, rows[0], run.heads.projectors[0]
    weight, dtype, exact = head.weight, hidden.dtype, statistics_dtype(hidden.dtype)
    slabs = split(0, weight.shape[0], min(tile.cols, plan.measured_cols))
    d_hidden = d_weight = d_bias = norms = None
    if plan.needs_hidden:
        d_hidden = hidden.new_empty(hidden.shape, dtype=dtype if len(slabs) == 1 else exact)
    if isinstance(onto, Gradients):
        d_weight, d_bias = onto.weight, onto.bias
    else:
        if plan.needs_weight:
            shape = weight.shape[0], head.trained_size
            new = weight.new_empty if groups else weight.new_zeros
            d_weight = new(shape, dtype=onto)
        if plan.needs_bias:
            d_bias = hidden.new_zeros(weight.shape[0], dtype=torch.float64)
    if plan.needs_weight and plan.measured_size:
        norms = hidden.new_zeros(plan.measured_size, dtype=exact)
    room = run.rule.models * tile.rows * row_stride(tile.cols, dtype, hidden.device)
    work = lease((room,), dtype, hidden.device)
    for columns in slabs if groups else ():
        # 16-bit products of several groups add up in float32.
        slab = None
        if d_weight is not None:
            slab = cut(d_weight, columns)
            if norms is not None:
                slab = slab.new_empty((slab.shape[0], plan.trained_size), dtype=exact)
            elif len(groups) > 1 and slab.dtype != exact:
                slab = torch.empty_like(slab, dtype=exact)
        for group in groups:
            matrix = group.tile(columns, work)
            if slab is not None:
                first = not isinstance(onto, Gradients) and group is groups[0]
                add_product(slab, matrix.t(), group.hidden, first, run.heads.room)
            if d_hidden is not None:
                own, begins = cut(d_hidden, group.rows), columns is slabs[0]
                add_product(own, matrix, cut(weight, columns), begins, run.heads.room)
            if d_bias is not None:
                add_column_sums(d_bias[columns], matrix, group.factor)
        if slab is None or d_weight is None:
            continue
        if norms is not None:
            norms += slab[:, head.trained_size :].square_().sum(0)
            d_weight[columns] = slab[:, : head.trained_size]
        elif slab.dtype != d_weight.dtype:
            d_weight[columns] = slab
    if d_hidden is not None:
        for group in groups:
            if group.factor is not None:
                own = cut(d_hidden, group.rows)
                run.heads.backend.scale_rows(own, group.factor, own)
        d_hidden = in_dtype(d_hidden, dtype)
    return Gradients(d_hidden, d_weight, d_bias, norms)
