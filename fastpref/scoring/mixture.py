# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities under logits mixed of two heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .autograd import products_of
from .backends.divergences import logit_blocks
from .retry import with_less
from .slab import Slab
from .two_heads import Model, Tiles, TwoHeadPlan, TwoHeads
from .types import statistics_dtype


def mixed_logprob(
    heads: TwoHeads, student: Model, teacher: Model, target: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The targets' log-probabilities under logits (1 + epsilon) s - epsilon t, and under (1 -
    epsilon) s + epsilon t, of a student's logits s and a teacher's t.

    Args:
        heads, student, teacher: of ``ask_two_heads``.
        target: (...) int64.

    Returns:
        Two tensors like ``target``, without gradient, 0 where ``heads`` scores nothing; NaN where
        the target is not in the vocabulary.
    """
    packing = heads.packing

    def attempt(plan: TwoHeadPlan) -> tuple[Tensor, Tensor]:
        tiles = Tiles.of(replace(heads, plan=plan), student, teacher)
        column = packing.gather(target.reshape(-1))
        found = tiles.rows.new_empty((2, column.shape[0]), dtype=statistics_dtype(plan.dtype))
        for rows in plan.chunks(0, plan.scored):
            own, other = tiles.project(rows)
            found[:, rows] = _mixed(own, other, tiles, column[rows], epsilon)
        plus, minus = (packing.spread(one).view(target.shape) for one in found)
        return plus, minus

    with torch.no_grad(), products_of(student.hidden):
        return with_less(attempt, heads.plan, heads.less, student.hidden.device)


def _mixed(
    student: Tensor, teacher: Tensor, tiles: Tiles, column: Tensor, epsilon: float
) -> Tensor:
    """(2, rows)."""
    own, other = Slab.of(tiles.student), Slab.of(tiles.teacher)
    parts = []
    for block, s, t in logit_blocks(own.products(student), other.products(teacher)):
        inside = (column[block] >= 0) & (column[block] < s.shape[1])
        index = torch.where(inside, column[block], 0)[:, None]
        # Of equal logits of -inf the difference is none.
        apart = torch.where(s == t, 0, s - t) * epsilon
        both = [
            (s + shift).log_softmax(1).gather(1, index)[:, 0].where(inside, torch.nan)
            for shift in (apart, -apart)
        ]
        parts.append(torch.stack(both))
    return torch.cat(parts, dim=1)
