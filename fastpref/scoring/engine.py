# SPDX-License-Identifier: Apache-2.0
"""The passes over tiles of logits: forward to row scores, backward to plain products.

With E = exp(t - anchor - offset) (times the map's slope), and its target column set to
    E[y] = (p[y] - 1) / scale_i,   scale_i = p / E,
the gradient of one token's logp is a row of E scaled by one number, c_i = -g_i scale_i (dt/dz):
    d hidden = c (E W),   d weight = E^T (c hidden),   d bias = E^T c.
So the upstream gradient g only ever scales rows of (N, H) matrices. See design notes in the README,
"Schedules".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import vocab_parallel
from .backends import RowBackend, UpstreamGradient
from .rows import RowScores, merge, row_scores, token_scores
from .schedule import GATHER_ROWS, Plan, Tile, recompute_tile
from .types import STATISTICS, Head, TokenScores, statistics_dtype
from .workspace import Lease

T = TypeVar("T")


class TargetLogit(NamedTuple):
    """Each row's target: its column here (outside [0, V) when another rank or nobody holds it), raw
    logit, logit."""

    column: Tensor
    raw: Tensor
    logit: Tensor


@dataclass(slots=True)
class Kept:
    """What lives from forward to backward, beside hidden and weight."""

    target: Tensor  # (N,), vocabulary ids
    rows: RowScores
    scale: Tensor  # (N,), p / E
    entropy: Tensor | None
    exps: Lease | None = None  # (kept rows, V)
    direct: Tensor | None = None  # (N, H), E W


def forward(
    hidden: Tensor,
    target: Tensor,
    head: Head,
    plan: Plan,
    backend: RowBackend,
    outputs: tuple[str, ...],
    group: dist.ProcessGroup | None,
) -> tuple[TokenScores, Kept]:
    """Scores of ``hidden`` (N, H) in the head's dtype, and what backward needs."""
    kept_rows = plan.kept_rows
    exps = (
        Lease((kept_rows, head.weight.shape[0]), hidden.dtype, hidden.device) if kept_rows else None
    )
    direct = torch.empty_like(hidden) if plan.schedule == "direct" else None
    tile = plan.forward_tile
    work = None
    if kept_rows < hidden.shape[0]:
        work = Lease(
            (min(tile.rows, hidden.shape[0] - kept_rows), tile.cols), hidden.dtype, hidden.device
        )
    parts: list[tuple[TokenScores, RowScores, Tensor]] = []
    for rows in _row_chunks(hidden.shape[0], kept_rows, tile.rows):
        if exps is not None and rows.stop <= kept_rows:
            buffer, write = exps.tensor[rows], True
        else:
            buffer, write = _given(work).tensor[: rows.stop - rows.start], direct is not None
        scores, row, scale = _score_chunk(
            hidden[rows], target[rows], head, backend, buffer, write, outputs, group
        )
        if direct is not None:
            torch.mm(buffer, head.weight, out=direct[rows])
        parts.append((scores, row, scale))
    scores, row, scale = _concatenate(parts)
    return scores, Kept(target, row, scale, scores.entropy, exps, direct)


def _row_chunks(total: int, kept: int, rows: int) -> Iterator[slice]:
    """Kept rows in one chunk, so that their product is one; the rest by the tile."""
    if kept:
        yield slice(0, kept)
    # No rows at all still make one (empty) chunk, for its dtypes.
    for start in range(kept, max(total, kept + (total == 0)), max(1, rows)):
        yield slice(start, min(total, start + rows))


def _concatenate(
    parts: list[tuple[TokenScores, RowScores, Tensor]],
) -> tuple[TokenScores, RowScores, Tensor]:
    if len(parts) == 1:
        return parts[0]
    scores, rows, scales = zip(*parts, strict=True)
    return (
        TokenScores(
            *(None if one[0] is None else torch.cat(one) for one in zip(*scores, strict=True))
        ),
        RowScores(*(torch.cat(one) for one in zip(*rows, strict=True))),
        torch.cat(scales),
    )


def _score_chunk(
    hidden: Tensor,
    target: Tensor,
    head: Head,
    backend: RowBackend,
    buffer: Tensor,
    write: bool,
    outputs: tuple[str, ...],
    group: dist.ProcessGroup | None,
) -> tuple[TokenScores, RowScores, Tensor]:
    """One chunk of rows. With ``write``, ``buffer`` (rows, V) ends as E."""
    own = target_logit(hidden, target, head, group)
    statistics = any(name in outputs for name in STATISTICS)
    vocab, cols = head.weight.shape[0], buffer.shape[1]
    parts = []
    for start in range(0, max(1, vocab), max(1, cols)):
        slab = slice(start, min(vocab, start + cols))
        tile = buffer[:, : slab.stop - slab.start]
        torch.mm(hidden, head.weight[slab].t(), out=tile)
        bias = None if head.bias is None else head.bias[slab]
        sums = backend.exp_rows(
            tile, own.column - start, own.logit, bias, head.map, write, statistics
        )
        if sums.best_index is not None:
            sums = sums._replace(best_index=sums.best_index + (start + head.start))
        parts.append(sums)
    local = merge(parts)
    sums = vocab_parallel.merge_ranks(local, group)
    rows = row_scores(sums, own.logit)
    # Of rows at their target's logit the exponent is 0 and nothing is rounded.
    scale = (local.anchor + local.offset - sums.anchor).exp() / rows.norm
    if write:
        _write_target(buffer, own, rows, scale, head)
    return token_scores(outputs, sums, rows, target, own.logit, head.vocab_size), rows, scale


def target_logit(
    hidden: Tensor, target: Tensor, head: Head, group: dist.ProcessGroup | None
) -> TargetLogit:
    """The target's logit by a gather and a dot product in the statistics' dtype; NaN for a target
    nobody holds."""
    column = target - head.start
    here = (column >= 0) & (column < head.weight.shape[0])
    index = torch.where(here, column, 0)
    dtype = statistics_dtype(hidden.dtype)
    raw = torch.empty(target.shape, dtype=dtype, device=hidden.device)
    for start in range(0, target.shape[0], GATHER_ROWS):
        block = slice(start, start + GATHER_ROWS)
        weight = head.weight.index_select(0, index[block]).to(dtype)
        raw[block] = (hidden[block].to(dtype) * weight).sum(-1)
    if head.bias is not None:
        raw += head.bias[index]
    # Each target has one owner: the sum over ranks is its value, and the count tells whether there
    # was one.
    shared = torch.stack([torch.where(here, raw, 0.0), here.to(dtype)])
    raw, owners = vocab_parallel.sum_over_ranks(shared, group)
    raw = torch.where(owners > 0, raw, torch.nan)
    return TargetLogit(torch.where(here, column, -1), raw, head.map.logit(raw))


def _write_target(
    exps: Tensor, own: TargetLogit, rows: RowScores, scale: Tensor, head: Head
) -> None:
    value = torch.expm1(rows.logp) / scale * head.map.slope(own.raw)
    # index_put_ touches one element a row; scatter_ on CPU copies the whole matrix.
    index = (torch.arange(exps.shape[0], device=exps.device), own.column.clamp(min=0))
    exps.index_put_(index, torch.where(own.column >= 0, value.to(exps.dtype), exps[index]))


class Upstream(NamedTuple):
    """Gradients at the outputs, (N,) in the statistics' dtype; None where none arrived."""

    logp: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None

    def rows(self, index: Tensor) -> Upstream:
        return Upstream(*(None if value is None else value[index] for value in self))


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class RowGroup(NamedTuple):
    """Rows whose gradient tiles come from one place: d weight gets tile^T ``left``, d hidden gets
    ``after`` (tile W)."""

    rows: slice
    tile: Callable[[slice, Tensor], Tensor]  # (columns, flat workspace) -> (rows, columns)
    left: Tensor  # (rows, H)
    after: Tensor | None  # (rows,)


def backward(
    hidden: Tensor, head: Head, plan: Plan, backend: RowBackend, kept: Kept, upstream: Upstream
) -> Gradients:
    """Gradients with respect to ``hidden`` (N, H), the weight and the raw bias, in the head's dtype
    (bias: statistics')."""
    general = upstream.entropy is not None or upstream.lse is not None
    g = upstream.logp if upstream.logp is not None else torch.zeros_like(kept.scale)
    upstream = upstream._replace(logp=g)
    coefficient = torch.where(g == 0, 0.0, -head.map.scale * g * kept.scale)
    if kept.direct is not None:
        return Gradients((kept.direct * coefficient[:, None]).to(hidden.dtype), None, None)
    active = _active_rows(upstream) if hidden.device.type == "cpu" else None
    count = hidden.shape[0] if active is None else active.shape[0]
    if count == 0:
        return _no_gradients(hidden, head, plan)
    if active is not None:
        hidden_all, hidden = hidden, hidden[active]
    groups, tile = _row_groups(
        hidden, head, plan, backend, kept, upstream, coefficient, active, general
    )
    gradients = _products(groups, tile, hidden, head, plan)
    if active is None or gradients.hidden is None:
        return gradients
    return gradients._replace(
        hidden=torch.zeros_like(hidden_all).index_copy_(0, active, gradients.hidden)
    )


def _active_rows(upstream: Upstream) -> Tensor | None:
    """Indices of rows with any gradient; None when all have one."""
    nonzero = torch.stack([value != 0 for value in upstream if value is not None]).any(0)
    return None if bool(nonzero.all()) else nonzero.nonzero()[:, 0]


def _no_gradients(hidden: Tensor, head: Head, plan: Plan) -> Gradients:
    return Gradients(
        torch.zeros_like(hidden) if plan.needs_hidden else None,
        torch.zeros_like(head.weight) if plan.needs_weight else None,
        torch.zeros_like(_given(head.bias)) if plan.needs_bias else None,
    )


def _row_groups(
    hidden: Tensor,
    head: Head,
    plan: Plan,
    backend: RowBackend,
    kept: Kept,
    upstream: Upstream,
    coefficient: Tensor,
    active: Tensor | None,
    general: bool,
) -> tuple[list[RowGroup], Tile]:
    """Groups over the active rows, kept ones first, and the tile they are worked through in."""
    total, vocab = hidden.shape[0], head.weight.shape[0]
    kept_rows = 0 if general or kept.exps is None else plan.kept_rows
    if active is not None:
        inside = int((active < kept_rows).sum())
        gathered, recomputed = inside, total - inside
    else:
        inside = min(kept_rows, total)
        gathered, recomputed = 0, total - inside
    left_over = plan.memory_budget - plan.kept_rows * vocab * hidden.dtype.itemsize
    # Kept rows that all have a gradient are read where they lie.
    tile = Tile(0, vocab)
    if gathered or recomputed:
        tile = recompute_tile(max(gathered, recomputed), vocab, hidden.dtype.itemsize, left_over)
    groups: list[RowGroup] = []
    exps = None if kept.exps is None else kept.exps.tensor
    for rows in _row_chunks(inside, 0, tile.rows if gathered else inside) if inside else ():
        chosen = rows if active is None else active[rows]
        c = coefficient[chosen]
        left = (
            hidden[rows] * c.to(hidden.dtype)[:, None]
            if plan.needs_weight or plan.needs_bias
            else hidden[rows]
        )
        groups.append(RowGroup(rows, _kept_tile(_given(exps), chosen), left, c))
    for rows in _row_chunks(recomputed, 0, tile.rows) if recomputed else ():
        rows = slice(inside + rows.start, inside + rows.stop)
        chosen = rows if active is None else active[rows]
        groups.append(
            RowGroup(
                rows,
                _recomputed_tile(hidden[rows], chosen, head, backend, kept, upstream),
                hidden[rows],
                None,
            )
        )
    return groups, tile


def _kept_tile(exps: Tensor, chosen: slice | Tensor) -> Callable[[slice, Tensor], Tensor]:
    def tile(columns: slice, workspace: Tensor) -> Tensor:
        if isinstance(chosen, slice):
            return exps[chosen, columns]
        out = _shaped(workspace, chosen.shape[0], columns)
        return torch.index_select(exps[:, columns], 0, chosen, out=out)

    return tile


def _recomputed_tile(
    hidden: Tensor,
    chosen: slice | Tensor,
    head: Head,
    backend: RowBackend,
    kept: Kept,
    upstream: Upstream,
) -> Callable[[slice, Tensor], Tensor]:
    rows = kept.rows
    gradient = UpstreamGradient(
        rows.anchor[chosen],
        # The NaN of a target nobody holds reaches its row through the norm.
        rows.norm[chosen],
        rows.logp[chosen],
        _given(upstream.logp)[chosen],
        None if upstream.lse is None else upstream.lse[chosen],
        None if upstream.entropy is None else upstream.entropy[chosen],
        None if upstream.entropy is None else _given(kept.entropy)[chosen],
    )
    column = kept.target[chosen] - head.start

    def tile(columns: slice, workspace: Tensor) -> Tensor:
        out = _shaped(workspace, hidden.shape[0], columns)
        torch.mm(hidden, head.weight[columns].t(), out=out)
        bias = None if head.bias is None else head.bias[columns]
        backend.logit_grad(out, column - columns.start, gradient, bias, head.map)
        return out

    return tile


def _shaped(workspace: Tensor, rows: int, columns: slice) -> Tensor:
    cols = columns.stop - columns.start
    return workspace[: rows * cols].view(rows, cols)


def _products(
    groups: list[RowGroup], tile: Tile, hidden: Tensor, head: Head, plan: Plan
) -> Gradients:
    """Every product of backward, one slab of the vocabulary at a time; each slab of d weight is
    written once."""
    vocab, dtype = head.weight.shape[0], hidden.dtype
    slabs = [
        slice(start, min(vocab, start + tile.cols)) for start in range(0, vocab, max(1, tile.cols))
    ]
    exact = statistics_dtype(dtype)
    d_hidden = d_weight = d_bias = None
    if plan.needs_hidden:
        d_hidden = torch.empty(
            hidden.shape, dtype=dtype if len(slabs) == 1 else exact, device=hidden.device
        )
    if plan.needs_weight:
        d_weight = torch.empty_like(head.weight)
    if plan.needs_bias:
        d_bias = torch.zeros(vocab, dtype=exact, device=hidden.device)
    work = Lease((tile.rows * tile.cols,), dtype, hidden.device)
    for number, columns in enumerate(slabs):
        slab = None
        if d_weight is not None:
            slab = d_weight[columns] if len(groups) == 1 else d_weight[columns].to(exact, copy=True)
        for first, group in zip([True] + [False] * len(groups), groups, strict=False):
            matrix = group.tile(columns, work.tensor)
            if slab is not None:
                _add_product(slab, matrix.t(), group.left, first)
            if d_hidden is not None:
                _add_product(d_hidden[group.rows], matrix, head.weight[columns], number == 0)
            if d_bias is not None:
                d_bias[columns] += _column_sums(matrix, group.after)
        if slab is not None and d_weight is not None and len(groups) > 1:
            d_weight[columns] = slab.to(dtype)
    if d_hidden is not None:
        for group in groups:
            if group.after is not None:
                d_hidden[group.rows] *= group.after[:, None]
        d_hidden = d_hidden.to(dtype)
    return Gradients(d_hidden, d_weight, d_bias)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b when ``first``, else total += a b; 16-bit products add up in a float32 total."""
    if total.dtype != a.dtype:
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _column_sums(matrix: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return matrix.sum(0, dtype=statistics_dtype(matrix.dtype))
    return torch.mm(matrix.t(), weights.to(matrix.dtype)[:, None])[:, 0]


def _given(value: T | None) -> T:
    if value is None:
        raise RuntimeError("a tensor that this schedule keeps is missing")
    return value
