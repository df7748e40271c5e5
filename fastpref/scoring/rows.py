# SPDX-License-Identifier: Apache-2.0
"""What follows from the sums of rows (statistics.py), on (rows,) vectors.

With S the sum of e_v = exp(t_v - a) over all columns v but the target's, whose logit is t_y:

    log_norm = log(S + exp(t_y - a)),   lse = a + log_norm,   logp = t_y - a - log_norm

which is -log1p(S), without cancellation, in the usual case a = t_y.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import RowScores, RowSums
from .types import LogitMap


class TargetLogits(NamedTuple):
    """Of each row, (rows,)."""

    column: Tensor  # the target's column, -1 where it is elsewhere
    raw: Tensor  # its product plus bias; NaN where it is elsewhere
    logit: Tensor


class Scored(NamedTuple):
    """Rows whose every column is in one tile, each (rows,)."""

    target_logit: Tensor
    sums: RowSums
    rows: RowScores
    scale: Tensor  # p / e of their exponentials


def row_scores(sums: RowSums, target_logit: Tensor) -> RowScores:
    relative = target_logit - sums.anchor
    norm = sums.sum + relative.exp()
    log_norm = torch.where(relative == 0, sums.sum.log1p(), norm.log())
    rows = RowScores(relative - log_norm, sums.anchor, norm, log_norm)
    if sums.best is None:
        return rows
    # About the largest logit, where log p and the entropy add up without cancelling.
    best = sums.best.double()
    moved = norm.double() * (sums.anchor.double() - best).exp()
    return rows._replace(
        anchor=sums.best, norm=moved.to(norm.dtype), log_norm=moved.log().to(norm.dtype)
    )


def exponential_scale(sums: RowSums, rows: RowScores) -> Tensor:
    """p / e of exponentials with the sums' anchor and offset."""
    # The anchors may lie far apart: their difference is rounded only after exp.
    moved = sums.anchor.double() + sums.offset.double() - rows.anchor.double()
    return (moved.exp() / rows.norm.double()).to(rows.norm.dtype)


def write_target(
    exps: Tensor, own: TargetLogits, rows: RowScores, scale: Tensor, map: LogitMap
) -> None:
    """The target's column of E: (p - 1) / scale, times the map's slope."""
    value = torch.expm1(rows.logp) / scale * map.slope(own.raw)
    # index_put_ touches one element a row; scatter_ on CPU copies the whole matrix.
    index = (
        torch.arange(exps.shape[0], device=exps.device, dtype=torch.int64),
        own.column.clamp(min=0),
    )
    exps.index_put_(index, torch.where(own.column >= 0, value.to(exps.dtype), exps[index]))
