# SPDX-License-Identifier: Apache-2.0
"""Scores of the targets: log-probabilities and what else ``TokenScores`` holds.

With e = exp(t - anchor - offset) (times the map's slope), the matrix E of a row is e with its
target column set to (p[y] - 1) / scale, where scale = p / e. The gradient of the row's logp is then
a row of E times one number, -scale (dt/dz). A gradient at entropy or lse, or at mean logits under a
cap, needs every row's products again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import vocab_parallel
from ..backends import UpstreamGradient
from ..halves import without_lost_rows
from ..mean_logit import add_capped_gradient
from ..products import multiply
from ..rows import Scored, TargetLogits, exponential_scale, row_scores, write_target
from ..slab import Projection
from ..statistics import (
    DIFFERENTIABLE,
    OUTPUTS,
    PLAIN,
    TokenScores,
    merge,
    token_scores,
)
from ..workspace import tile_of
from . import Again, Found, Heads, Numbers, Part, Upstream


@dataclass(frozen=True, slots=True)
class Scores:
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...] = DIFFERENTIABLE

    models: ClassVar[int] = 1
    matrices: ClassVar[int] = 1
    formed_again: ClassVar[int] = 1
    mixes: ClassVar[bool] = False
    output_names: ClassVar[tuple[str, ...]] = OUTPUTS
    number_names: ClassVar[tuple[str, ...]] = ("logp", "anchor", "norm", "scale", "entropy")

    @property
    def numbers(self) -> tuple[str, ...]:
        return self.number_names if "entropy" in self.outputs else self.number_names[:-1]

    @property
    def statistics(self) -> bool:
        return not PLAIN.issuperset(self.outputs)

    def forward(self, heads: Heads, part: Part, tiles: Sequence[Tensor], write: bool) -> Found:
        tile = tiles[0] if tiles else None
        return self.of_tile(heads, part, tile, write, formed=False)

    def of_tile(
        self,
        heads: Heads,
        part: Part,
        tile: Tensor | None,
        write: bool,
        formed: bool,
    ) -> Found:
        """``forward``; ``formed`` says that the tile holds the products already."""
        outputs = self.outputs
        if heads.mean is not None:
            outputs = tuple(name for name in outputs if name != "mean_logits")
        found = _scored(heads, part, tile, write, not PLAIN.issuperset(outputs), formed)
        logit, sums, row, scale = found
        columns = heads.projectors[0].vocab_size
        scores = token_scores(outputs, sums, row, part.target, logit, columns)
        return Found(scores, (row.logp, row.anchor, row.norm, scale, scores.entropy))

    def factors(
        self, heads: Heads, numbers: Numbers, upstream: Upstream
    ) -> tuple[Tensor, ...] | None:
        *_, scale, _ = numbers
        given = TokenScores._make(upstream)
        others = given.entropy, given.lse, given.mean_logits
        if scale is None or any(one is not None for one in others):
            return None
        g = torch.zeros_like(scale) if given.logp is None else given.logp
        map = heads.projectors[0].map
        scale = scale if map.factor is None else scale * map.factor
        return (heads.backend.gradient_factors(g, scale, map.scale),)

    def again(self, heads: Heads, part: Part, numbers: Numbers, upstream: Upstream) -> Again:
        head, hidden = heads.projectors[0], part.rows[0]
        gradient, column = self.gradient(numbers, upstream), part.target - head.start
        mean = TokenScores._make(upstream).mean_logits
        if mean is not None:
            mean = mean * (head.map.rate(mean) / head.vocab_size)

        def tile(columns: slice, workspace: Tensor) -> Tensor:
            out = tile_of(workspace, hidden.shape[0], columns)
            at = Projection(hidden, head.slab(columns), out, column - columns.start)
            if mean is None:
                heads.backend.project_gradient(at, gradient)
            else:
                multiply(hidden, at.slab.weight.t(), out, heads.room)
                add_capped_gradient(heads.backend, at, gradient, mean)
            return out

        return Again(tile, None)

    def gradient(self, numbers: Numbers, upstream: Upstream) -> UpstreamGradient:
        """What a backend makes D of."""
        logp, anchor, norm, scale, entropy = numbers
        given = TokenScores._make(upstream)
        if logp is None or anchor is None or norm is None or scale is None:
            raise RuntimeError("no numbers of these rows")
        # The NaN of a target nobody holds reaches its row through norm.
        return UpstreamGradient(
            anchor,
            norm,
            logp,
            torch.zeros_like(scale) if given.logp is None else given.logp,
            given.lse,
            given.entropy,
            None if given.entropy is None else entropy,
        )


def _scored(
    heads: Heads,
    part: Part,
    tile: Tensor | None,
    write: bool,
    statistics: bool,
    formed: bool,
) -> Scored:
    """Of some rows, one slab of the vocabulary after the other. With ``write``, ``tile`` (rows, V)
    ends as E; without a tile, the backend works in none."""
    head, backend = heads.projectors[0], heads.backend
    hidden, target = part.rows[0], part.target
    vocab = head.weight.shape[0]
    cols = vocab if tile is None else tile.shape[1]
    if heads.group is None and cols == vocab:
        column = target - head.start if head.start else target
        at = Projection(hidden, head.slab(), tile, column)
        found = backend.score(at, write, statistics, formed)
        if found is not None:
            return found._replace(sums=found.sums.moved(head.start))
    own = target_logits(heads, hidden, target)
    reduce = backend.exp_rows if formed else backend.project
    parts = []
    for start in range(0, vocab, cols):
        columns = slice(start, min(vocab, start + cols))
        room = None if tile is None else tile[:, : columns.stop - start]
        column = own.column - start if start else own.column
        at = Projection(hidden, head.slab(columns), room, column)
        sums = reduce(at, own.logit, write, statistics)
        parts.append(sums.moved(start + head.start))
    sums = merge(parts)
    kept = tile if write else None
    if heads.group is None:
        rows, scale = backend.settle(sums, own, kept, head.map.of_all_rows)
    else:
        local, sums = sums, vocab_parallel.merge_ranks(sums, heads.group)
        rows = row_scores(sums, own.logit)
        scale = exponential_scale(local, rows)
        if kept is not None:
            scale = _raised_scale(heads, kept, scale)
            write_target(kept, own, rows, scale, head.map)
    if hidden.dtype == torch.float16:
        rows, scale = without_lost_rows(rows, scale, head, heads.group)
    return Scored(own.logit, sums, rows, scale)


def target_logits(heads: Heads, hidden: Tensor, target: Tensor) -> TargetLogits:
    """By a gather and a dot product in the statistics' dtype; NaN for a target nobody holds."""
    head = heads.projectors[0]
    column = target - head.start if head.start else target
    slab, factor = head.slab(), head.map.factor
    own = heads.backend.target_logits(hidden, slab._replace(map=slab.map.of_all_rows), column)
    if heads.group is None:
        return own if factor is None else own._replace(logit=own.logit * factor)
    # A target has one owner: the sum over ranks is its value, and the count says if there was one.
    here = own.column >= 0
    shared = torch.stack([torch.where(here, own.raw, 0.0), here.to(own.raw.dtype)])
    raw, owners = vocab_parallel.sum_over_ranks(shared, heads.group)
    raw = torch.where(owners > 0, raw, torch.nan)
    return TargetLogits(own.column, raw, head.map.logit(raw))


def _raised_scale(heads: Heads, exps: Tensor, scale: Tensor) -> Tensor:
    """Move rows whose logits all lie far below another rank's to a scale that does not underflow.

    E[y] is divided by the scale; E and its products must fit E's dtype: a half holds probabilities.
    """
    floor = 1.0 if exps.dtype == torch.float16 else 2.0**-100
    factor = torch.where(scale < floor, scale / floor, 1.0)
    heads.backend.scale_rows(exps, factor, exps)
    return torch.where(scale < floor, floor, scale)
