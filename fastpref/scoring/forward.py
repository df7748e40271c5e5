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

from . import vocab_parallel, workspace
from .backends import RowBackend
from .mean_logit import MeanRow
from .rows import (
    RowScores,
    TargetLogits,
    exponential_scale,
    row_scores,
    write_target,
)
from .schedule import Plan
from .slab import Slab
from .statistics import merge, token_scores
from .types import Head, TokenScores, needs_statistics
from .workspace import lease


class Run(NamedTuple):
    """What both passes of one call share."""

    head: Head
    plan: Plan
    backend: RowBackend
    group: dist.ProcessGroup | None
    mean: MeanRow | None = None  # where the forward pass is asked for mean logits without a cap


@dataclass(slots=True)
class Kept:
    """What lives from forward to backward, beside hidden and weight."""

    target: Tensor  # (N,), vocabulary ids
    rows: RowScores
    scale: Tensor  # (N,), p / e
    entropy: Tensor | None
    exps: Tensor | None = None  # E, (kept rows, V)
    direct: Tensor | None = None  # E W, (N, H)

    def give_back(self) -> None:
        """The memory of the exponentials; backward then recomputes their rows."""
        if self.exps is not None:
            workspace.give_back(self.exps)
            self.exps = None


def forward(
    run: Run, hidden: Tensor, target: Tensor, outputs: tuple[str, ...]
) -> tuple[TokenScores, Kept]:
    """Scores of ``hidden`` (N, H) in the head's dtype, and what backward needs."""
    plan, weight = run.plan, run.head.weight
    if run.mean is not None:
        # What remains is asked of the tiles.
        outputs = tuple(name for name in outputs if name != "mean_logits")
    total, kept_rows = hidden.shape[0], plan.kept_rows
    exps = work = direct = None
    if kept_rows:
        exps = lease((kept_rows, weight.shape[0]), hidden.dtype, hidden.device)
    direct_rows = plan.schedule == "direct"
    if (kept_rows < total or total == 0) and (direct_rows or plan.scores_in_tiles):
        rows = min(plan.forward_tile.rows, total - kept_rows)
        cols = min(plan.forward_tile.cols, weight.shape[0])
        work = lease((rows, cols), hidden.dtype, hidden.device)
    if direct_rows:
        direct = torch.empty_like(hidden)
    parts = []
    for chunk in _chunks(total, kept_rows, plan.forward_tile.rows):
        room = exps if chunk.stop <= kept_rows and exps is not None else work
        buffer = None if room is None else room[: chunk.stop - chunk.start]
        write = buffer is not None and (room is exps or direct is not None)
        parts.append(_score_chunk(run, hidden[chunk], target[chunk], buffer, write, outputs))
        if direct is not None and buffer is not None:
            torch.mm(buffer, weight, out=direct[chunk])
    chunk_scores, chunk_rows, chunk_scales = zip(*parts, strict=True)
    scores = TokenScores._make(map(_concatenate, zip(*chunk_scores, strict=True)))
    if run.mean is not None:
        scores = scores._replace(mean_logits=run.mean.logits(hidden))
    row = RowScores._make(map(_concatenate, zip(*chunk_rows, strict=True)))
    scale = chunk_scales[0] if len(chunk_scales) == 1 else torch.cat(chunk_scales)
    return scores, Kept(target, row, scale, scores.entropy, exps, direct)


def _chunks(total: int, kept: int, rows: int) -> Iterator[slice]:
    """Kept rows in one chunk, so that their product is one; the others by the tile."""
    if kept:
        yield slice(0, kept)
    # No rows at all still make one chunk, empty, for its dtypes.
    for start in range(kept, max(total, 1) if kept == 0 else total, max(1, rows)):
        yield slice(start, min(total, start + rows))


def _concatenate(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if len(present) == 1:
        return present[0]
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
    own = target_logits(run, hidden, target)
    vocab = head.weight.shape[0]
    cols = vocab if buffer is None else buffer.shape[1]
    parts = []
    for start in range(0, vocab, cols):
        columns = slice(start, min(vocab, start + cols))
        sums = run.backend.project(
            hidden,
            Slab.of(head, columns),
            None if buffer is None else buffer[:, : columns.stop - start],
            own.column - start if start else own.column,
            own.logit,
            write,
            needs_statistics(outputs),
        )
        if sums.best_index is not None and start + head.start:
            sums = sums._replace(best_index=sums.best_index + (start + head.start))
        parts.append(sums)
    sums = merge(parts)
    kept = buffer if write else None
    if run.group is None:
        rows, scale = run.backend.settle(sums, own, kept, head.map)
    else:
        local, sums = sums, vocab_parallel.merge_ranks(sums, run.group)
        rows = row_scores(sums, own.logit)
        scale = exponential_scale(local, rows)
        if kept is not None:
            scale = _raise_scale(run, kept, scale)
            write_target(kept, own, rows, scale, head.map)
    return token_scores(outputs, sums, rows, target, own.logit, head.vocab_size), rows, scale


def target_logits(run: Run, hidden: Tensor, target: Tensor) -> TargetLogits:
    """By a gather and a dot product in the statistics' dtype; NaN for a target nobody holds."""
    head = run.head
    column = target - head.start if head.start else target
    own = run.backend.target_logits(hidden, Slab.of(head), column)
    if run.group is None:
        return own
    # A target has one owner: the sum over ranks is its value, and the count says if there was one.
    here = own.column >= 0
    shared = torch.stack([torch.where(here, own.raw, 0.0), here.to(own.raw.dtype)])
    raw, owners = vocab_parallel.sum_over_ranks(shared, run.group)
    raw = torch.where(owners > 0, raw, torch.nan)
    return TargetLogits(own.column, raw, head.map.logit(raw))


def _raise_scale(run: Run, exps: Tensor, scale: Tensor) -> Tensor:
    """Move rows whose logits all lie far below another rank's to a scale that does not underflow.

    E[y] is divided by the scale; E and its products must fit E's dtype: a half holds probabilities.
    """
    floor = 1.0 if exps.dtype == torch.float16 else 2.0**-100
    factor = torch.where(scale < floor, scale / floor, 1.0)
    run.backend.scale_rows(exps, factor, exps)
    return torch.where(scale < floor, floor, scale)
