# SPDX-License-Identifier: Apache-2.0
"""The backward pass: matrix products over row groups, one slab of the vocabulary at a time.

With E as forward.py keeps it and c = -g scale (dt/dz), g the upstream gradient of logp,

    d hidden = c (E W),   d weight = E^T (c hidden),   d bias = E^T c.

Rows that were not kept, and every row once a gradient arrives at entropy or lse, are projected
again; a backend then turns the tile into the gradient D of the raw products itself, and

    d hidden = D W,   d weight = D^T hidden,   d bias = D^T 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import UpstreamGradient
from .backends.column_sums import add_column_sums
from .forward import Kept, Run
from .schedule import PRODUCT_BYTES, Tile, recompute_tile
from .slab import Slab
from .types import statistics_dtype
from .workspace import lease, row_stride


class Upstream(NamedTuple):
    """Gradients at the outputs, (N,) in the statistics' dtype; None where none arrived."""

    logp: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None


class Gradients(NamedTuple):
    """With respect to hidden (N, H), the weight's trained columns (V, H) and the bias added to raw
    products, (V,)."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class RowGroup(NamedTuple):
    """Rows whose tiles come from one place."""

    rows: slice
    tile: Callable[[slice, Tensor], Tensor]  # (columns, flat workspace) -> (rows, columns)
    hidden: Tensor  # (rows, trained columns), scaled by c where the tile is not
    after: Tensor | None  # (rows,), c where the tile is not scaled by it


def backward(
    run: Run,
    hidden: Tensor,
    kept: Kept,
    upstream: Upstream,
    onto: Gradients | torch.dtype,
) -> Gradients:
    """Gradients in the head's dtype (bias: float64); that of the weight in the dtype ``onto``, or
    those of weight and bias added ``onto`` totals in the statistics' dtype (bias: float64)."""
    g = torch.zeros_like(kept.scale) if upstream.logp is None else upstream.logp
    upstream = upstream._replace(logp=g)
    # A row without upstream gradient gets none, whatever it holds.
    c = torch.where(g == 0, 0.0, -run.head.map.scale * g * kept.scale)
    if kept.direct is not None:
        d_hidden = run.backend.scale_rows(kept.direct, c, torch.empty_like(hidden))
        return Gradients(d_hidden.masked_fill_((g == 0)[:, None], 0), None, None)
    active = _active_rows(upstream) if hidden.device.type == "cpu" else None
    if active is None:
        return _products(run, hidden, onto, *_row_groups(run, hidden, kept, upstream, c, None))
    some = hidden[active]
    gradients = _products(run, some, onto, *_row_groups(run, some, kept, upstream, c, active))
    if gradients.hidden is None:
        return gradients
    d_hidden = torch.zeros_like(hidden).index_copy_(0, active, gradients.hidden)
    return gradients._replace(hidden=d_hidden)


def _active_rows(upstream: Upstream) -> Tensor | None:
    """Indices of rows with any gradient; None when all have one."""
    nonzero = torch.stack([value != 0 for value in upstream if value is not None]).any(0)
    return None if bool(nonzero.all()) else nonzero.nonzero()[:, 0]


def _row_groups(
    run: Run, hidden: Tensor, kept: Kept, upstream: Upstream, c: Tensor, active: Tensor | None
) -> tuple[list[RowGroup], Tile]:
    """Groups of the rows in ``hidden``, kept ones first, and the tile they are worked through in.

    ``active`` are their positions in the arguments of all rows; None: they are all rows.
    """
    vocab, itemsize = run.head.weight.shape[0], hidden.dtype.itemsize
    # What memory held, which may be less than was planned.
    total, kept_rows = hidden.shape[0], 0 if kept.exps is None else kept.exps.shape[0]
    exps = kept.exps if upstream.entropy is None and upstream.lse is None else None
    inside = 0
    if exps is not None:
        inside = kept_rows if active is None else int((active < kept_rows).sum())
    gathered = 0 if active is None else inside
    # Kept rows that all have a gradient are read where they lie.
    tile = Tile(0, vocab)
    if gathered or inside < total:
        budget = run.plan.memory_budget - kept_rows * vocab * itemsize
        slab_bytes = run.plan.slab_bytes if 0 < inside < total else 0
        tile = recompute_tile(max(gathered, total - inside), vocab, itemsize, budget, slab_bytes)
    trained = hidden[:, run.head.trained :]
    groups = []
    if exps is not None:
        for rows in _split(0, inside, tile.rows if gathered else inside):
            chosen = rows if active is None else active[rows]
            scaled = trained[rows]
            if run.plan.needs_weight:
                scaled = run.backend.scale_rows(scaled, c[chosen], torch.empty_like(scaled))
            groups.append(RowGroup(rows, _kept_tile(exps, chosen), scaled, c[chosen]))
    for rows in _split(inside, total, tile.rows):
        chosen = rows if active is None else active[rows]
        source = _recomputed_tile(run, hidden[rows], kept, upstream, chosen)
        groups.append(RowGroup(rows, source, trained[rows], None))
    return groups, tile


def _split(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(stop, at + size)) for at in range(start, stop, max(1, size))]


def _kept_tile(exps: Tensor, chosen: slice | Tensor) -> Callable[[slice, Tensor], Tensor]:
    def tile(columns: slice, workspace: Tensor) -> Tensor:
        if isinstance(chosen, slice):
            return exps[chosen, columns]
        out = _shaped(workspace, chosen.shape[0], columns)
        return torch.index_select(exps[:, columns], 0, chosen, out=out)

    return tile


def _recomputed_tile(
    run: Run, hidden: Tensor, kept: Kept, upstream: Upstream, chosen: slice | Tensor
) -> Callable[[slice, Tensor], Tensor]:
    head, rows = run.head, kept.rows
    # The NaN of a target nobody holds reaches its row through norm.
    values = (
        rows.anchor,
        rows.norm,
        rows.logp,
        upstream.logp,
        upstream.lse,
        upstream.entropy,
        None if upstream.entropy is None else kept.entropy,
    )
    gradient = UpstreamGradient._make(None if one is None else one[chosen] for one in values)
    column = kept.target[chosen] - head.start

    def tile(columns: slice, workspace: Tensor) -> Tensor:
        out = _shaped(workspace, hidden.shape[0], columns)
        slab = Slab.of(head, columns)
        run.backend.project_gradient(hidden, slab, out, column - columns.start, gradient)
        return out

    return tile


def _shaped(workspace: Tensor, rows: int, columns: slice) -> Tensor:
    cols = columns.stop - columns.start
    stride = row_stride(cols, workspace.dtype, workspace.device)
    return workspace[: rows * stride].view(rows, stride)[:, :cols]


def _products(
    run: Run, hidden: Tensor, onto: Gradients | torch.dtype, groups: list[RowGroup], tile: Tile
) -> Gradients:
    """All products, slab by slab; each slab of d weight is written once."""
    plan, weight, dtype = run.plan, run.head.weight, hidden.dtype
    slabs = _split(0, weight.shape[0], tile.cols)
    exact = statistics_dtype(dtype)
    d_hidden = d_weight = d_bias = None
    if plan.needs_hidden:
        d_hidden = hidden.new_empty(hidden.shape, dtype=dtype if len(slabs) == 1 else exact)
    if isinstance(onto, Gradients):
        d_weight, d_bias = onto.weight, onto.bias
    else:
        if plan.needs_weight:
            shape = weight.shape[0], weight.shape[1] - run.head.trained
            new = weight.new_empty if groups else weight.new_zeros
            d_weight = new(shape, dtype=onto)
        if plan.needs_bias:
            d_bias = hidden.new_zeros(weight.shape[0], dtype=torch.float64)
    stride = row_stride(tile.cols, dtype, hidden.device)
    work = lease((tile.rows * stride,), dtype, hidden.device)
    for columns in slabs if groups else ():
        # 16-bit products of several groups add up in float32.
        slab = None
        if d_weight is not None:
            slab = d_weight[columns]
            if len(groups) > 1 and slab.dtype != exact:
                slab = torch.empty_like(slab, dtype=exact)
        for group in groups:
            matrix = group.tile(columns, work)
            if slab is not None:
                first = not isinstance(onto, Gradients) and group is groups[0]
                add_product(slab, matrix.t(), group.hidden, first)
            if d_hidden is not None:
                add_product(d_hidden[group.rows], matrix, weight[columns], columns is slabs[0])
            if d_bias is not None:
                add_column_sums(d_bias[columns], matrix, group.after)
        if slab is not None and d_weight is not None and slab.dtype != d_weight.dtype:
            d_weight[columns] = slab
    if d_hidden is not None:
        for group in groups:
            if group.after is not None:
                rows = d_hidden[group.rows]
                run.backend.scale_rows(rows, group.after, rows)
        d_hidden = d_hidden.to(dtype)
    return Gradients(d_hidden, d_weight, d_bias)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b when ``first``, else total += a b."""
    if total.dtype != a.dtype:
        rows = max(1, PRODUCT_BYTES // (b.shape[1] * b.itemsize))
        for part, own in zip(total.split(rows), a.split(rows), strict=True):
            product = torch.mm(own, b)
            part.copy_(product) if first else part.add_(product)
    elif first:
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)
