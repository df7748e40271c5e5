# SPDX-License-Identifier: Apache-2.0
"""The forward pass: tiles of raw products to row scores, and exponentials kept for backward.

With e = exp(t - anchor - offset) (times the map's slope), the matrix E of a row is e with its
target column set to (p[y] - 1) / scale, where scale = p / e. The gradient of the row's logp is then
a row of E times one number, -scale (dt/dz), so that any upstream gradient only ever scales rows of
(N, H) matrices: see backward.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import vocab_parallel
from .backends import RowBackend
from .rows import RowScores, merge, row_scores, token_scores
from .schedule import Plan
from .types import Head, TokenScores, needs_statistics
from .workspace import Lease


class Run(NamedTuple):
    """What both passes of one call share."""

    head: Head
    plan: Plan
    backend: RowBackend
    group: dist.ProcessGroup | None


@dataclass(slots=True)
class Kept:
    """What lives from forward to backward, beside hidden and weight."""

    target: Tensor  # (N,), vocabulary ids
    rows: RowScores
    scale: Tensor  # (N,), p / e
    entropy: Tensor | None
    exps: Tensor | None = None  # E, (kept rows, V)
    direct: Tensor | None = None  # E W, (N, H)


class TargetLogit(NamedTuple):
    """Of each row: the target's column here (-1: not here), its raw logit, its logit."""

    column: Tensor
    raw: Tensor
    logit: Tensor


def forward(
    run: Run, hidden: Tensor, target: Tensor, outputs: tuple[str, ...]
) -> tuple[TokenScores, Kept]:
    """Scores of ``hidden`` (N, H) in the head's dtype, and what backward needs."""
    plan, weight = run.plan, run.head.weight
    total, kept_rows = hidden.shape[0], plan.kept_rows
    exps = work = direct = None
    if kept_rows:
        exps = Lease((kept_rows, weight.shape[0]), hidden.dtype, hidden.device)
    direct_rows = plan.schedule == "direct"
    if (kept_rows < total or total == 0) and (direct_rows or plan.scores_in_tiles):
        rows = min(plan.forward_tile.rows, total - kept_rows)
        cols = min(plan.forward_tile.cols, weight.shape[0])
        work = Lease((rows, cols), hidden.dtype, hidden.device)
    if direct_rows:
        direct = torch.empty_like(hidden)
    parts = []
    for chunk in _chunks(total, kept_rows, plan.forward_tile.rows):
        lease = exps if chunk.stop <= kept_rows and exps is not None else work
        buffer = None if lease is None else lease.tensor[: chunk.stop - chunk.start]
        write = buffer is not None and (lease is exps or direct is not None)
        parts.append(_score_chunk(run, hidden[chunk], target[chunk], buffer, write, outputs))
        if direct is not None and buffer is not None:
            torch.mm(buffer, weight, out=direct[chunk])
    scores = TokenScores._make(map(_concatenate, zip(*(part[0] for part in parts), strict=True)))
    row = RowScores._make(torch.cat(one) for one in zip(*(part[1] for part in parts), strict=True))
    scale = torch.cat([part[2] for part in parts])
    return scores, Kept(
        target, row, scale, scores.entropy, None if exps is None else exps.tensor, direct
    )


def _chunks(total: int, kept: int, rows: int) -> Iterator[slice]:
    """Kept rows in one chunk, so that their product is one; the others by the tile."""
    if kept:
        yield slice(0, kept)
    # No rows at all still make one chunk, empty, for its dtypes.
    for start in range(kept, max(total, 1) if kept == 0 else total, max(1, rows)):
        yield slice(start, min(total, start + rows))


def _concatenate(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _score_chunk(
    run: Run,
    hidden: Tensor,
    target: Tensor,
    buffer: Tensor | None,
    write: bool,
    outputs: tuple[str, ...],
) -> tuple[TokenScores, RowScores, Tensor]:
    """Scores, row scores and scale of some rows. With ``write``, ``buffer`` (rows, V) ends as E;
    without a buffer, the backend works in none."""
    head = run.head
    own = target_logit(run, hidden, target)
    vocab = head.weight.shape[0]
    cols = vocab if buffer is None else buffer.shape[1]
    parts = []
    for start in range(0, vocab, cols):
        slab = slice(start, min(vocab, start + cols))
        sums = run.backend.project(
            hidden,
            head.weight[slab],
            None if buffer is None else buffer[:, : slab.stop - start],
            own.column - start,
            own.logit,
            None if head.bias is None else head.bias[slab],
            head.map,
            write,
            needs_statistics(outputs),
        )
        if sums.best_index is not None:
            sums = sums._replace(best_index=sums.best_index + (start + head.start))
        parts.append(sums)
    local = merge(parts)
    sums = vocab_parallel.merge_ranks(local, run.group)
    rows = row_scores(sums, own.logit)
    # The anchors may lie far apart: their difference is rounded only after exp.
    moved = local.anchor.double() + local.offset.double() - rows.anchor.double()
    scale = (moved.exp() / rows.norm.double()).to(rows.norm.dtype)
    if write and buffer is not None:
        if run.group is not None:
            scale = _raise_scale(run, buffer, scale)
        _write_target(buffer, own, rows, scale, head)
    return token_scores(outputs, sums, rows, target, own.logit, head.vocab_size), rows, scale


def target_logit(run: Run, hidden: Tensor, target: Tensor) -> TargetLogit:
    """By a gather and a dot product in the statistics' dtype; NaN for a target nobody holds."""
    head = run.head
    column = target - head.start
    here = (column >= 0) & (column < head.weight.shape[0])
    index = torch.where(here, column, 0)
    raw = run.backend.gather_dot(hidden, head.weight, index)
    if head.bias is not None:
        raw += head.bias[index]
    # A target has one owner: the sum over ranks is its value, and the count says if there was one.
    shared = torch.stack([torch.where(here, raw, 0.0), here.to(raw.dtype)])
    raw, owners = vocab_parallel.sum_over_ranks(shared, run.group)
    raw = torch.where(owners > 0, raw, torch.nan)
    return TargetLogit(torch.where(here, column, -1), raw, head.map.logit(raw))


def _raise_scale(run: Run, exps: Tensor, scale: Tensor) -> Tensor:
    """Move rows whose logits all lie far below another rank's to a scale that does not underflow.

    E[y] is divided by the scale; E and its products must fit E's dtype: a half holds probabilities.
    """
    floor = 1.0 if exps.dtype == torch.float16 else 2.0**-100
    factor = torch.where(scale < floor, scale / floor, 1.0)
    run.backend.scale_rows(exps, factor, exps)
    return torch.where(scale < floor, floor, scale)


def _write_target(
    exps: Tensor, own: TargetLogit, rows: RowScores, scale: Tensor, head: Head
) -> None:
    value = torch.expm1(rows.logp) / scale * head.map.slope(own.raw)
    # index_put_ touches one element a row; scatter_ on CPU copies the whole matrix.
    index = (torch.arange(exps.shape[0], device=exps.device), own.column.clamp(min=0))
    exps.index_put_(index, torch.where(own.column >= 0, value.to(exps.dtype), exps[index]))
