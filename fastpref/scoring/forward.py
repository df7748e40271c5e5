# SPDX-License-Identifier: Apache-2.0
"""The forward pass: tiles of raw products to a rule's outputs, and what its gradient is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import workspace
from .mean_logit import MeanRow
from .plan import Plan
from .products import cut, multiply
from .rules import Heads, Part, Rule
from .workspace import lease


class Run(NamedTuple):
    """What both passes of one call share."""

    rule: Rule
    heads: Heads
    plan: Plan


class Kept(NamedTuple):
    """What lives from forward to backward, beside hidden states and heads."""

    target: Tensor  # (N,)
    numbers: tuple[Tensor | None, ...]  # (N,), of the rule
    matrices: tuple[Tensor, ...] = ()  # of the rule, (kept rows, V) each
    direct: tuple[Tensor, ...] = ()  # these times the weight, (N, H) each
    mean: MeanRow | None = None  # of ``Heads``, so that the weight is read once
    factor: Tensor | None = None  # (N,), of the maps of ``Heads``

    @property
    def rows(self) -> int:
        """Whose matrices are kept: fewer than planned where memory was given back."""
        return self.matrices[0].shape[0] if self.matrices else 0

    def given_back(self) -> Kept:
        """Without the matrices, and their memory free; backward then forms them again."""
        for matrix in self.matrices:
            workspace.give_back(matrix)
        return self._replace(matrices=())


def forward(
    run: Run,
    rows: Sequence[Tensor],
    target: Tensor,
    factor: Tensor | None,
    direction: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor | None, ...], Kept]:
    """The rule's outputs, (N,) each, of ``rows`` (N, H) of each model in the products' dtype, and
    what backward needs; ``factor`` (N,) is that of the logit maps, ``direction`` that of ``Part``.
    """
    rule, heads, plan = run.rule, run.heads.with_factor(factor), run.plan
    hidden = rows[0]
    workspace.begin_pass()
    kept: list[Tensor] = []
    if plan.kept_rows:
        shape = plan.kept_rows, heads.projectors[0].weight.shape[0]
        kept = [lease(shape, hidden.dtype, hidden.device) for _ in range(rule.matrices)]
    direct: list[Tensor] = []
    if plan.schedule == "direct":
        direct = [torch.empty_like(hidden) for _ in range(rule.matrices)]
    room = _room(run, hidden, len(kept))
    parts = []
    for chunk in plan.chunks:
        tiles = []
        if kept and chunk.stop <= plan.kept_rows:
            tiles = [cut(one, chunk) for one in kept]
        write = bool(tiles or direct)
        tiles += [one[: chunk.stop - chunk.start] for one in room[len(tiles) :] if one is not None]
        along = None if direction is None else (cut(direction[0], chunk), cut(direction[1], chunk))
        part = Part([cut(one, chunk) for one in rows], cut(target, chunk), along)
        parts.append(rule.forward(heads.of_rows(chunk), part, tiles, write))
        for matrix, out in zip(tiles, direct, strict=False):
            multiply(matrix, heads.projectors[0].weight, out[chunk], heads.room)
    if len(parts) == 1:
        outputs, numbers = parts[0]
    else:
        outputs, numbers = (_joined(one) for one in zip(*parts, strict=True))
    if heads.mean is not None:
        at = rule.output_names.index("mean_logits")
        means = heads.mean.logits(hidden)
        means = means if factor is None else means * factor
        outputs = (*outputs[:at], means, *outputs[at + 1 :])
    return outputs, Kept(target, numbers, tuple(kept), tuple(direct), heads.mean, factor)


def _room(run: Run, hidden: Tensor, matrices: int) -> list[Tensor | None]:
    """For the products of each model, where they are formed in memory and not in the place of what
    is kept."""
    plan = run.plan
    if not (plan.scores_in_tiles or plan.schedule == "direct"):
        return []
    left = plan.scored - plan.kept_rows
    first = 0 if left or not plan.scored else matrices
    if first == run.rule.models:
        return []
    models, width = run.rule.models, run.heads.projectors[0].weight.shape[0]
    rows = plan.forward_tile.rows if models > 1 else min(plan.forward_tile.rows, left)
    shape = rows, min(plan.forward_tile.cols, width)
    return [
        lease(shape, hidden.dtype, hidden.device) if at >= first else None for at in range(models)
    ]


def _joined(parts: Sequence[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """Of chunks, one after the other."""
    return tuple(map(_concatenated, zip(*parts, strict=True)))


def _concatenated(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
