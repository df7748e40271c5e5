# SPDX-License-Identifier: Apache-2.0
"""Row sums of anchored exponentials and what follows from them, on (rows,) vectors.

Every row has an anchor a; over the columns v of a tile but the target's, e_v = exp(t_v - a). Sums
over parts of the vocabulary (slabs, ranks) add up once they share an anchor. From the sums and the
target's logit t_y:

    log_norm = log(S + exp(t_y - a)),   lse = a + log_norm,   logp = t_y - a - log_norm

which is -log1p(S), without cancellation, in the usual case a = t_y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .types import LogitMap, TokenScores


class RowSums(NamedTuple):
    """Sums of one tile, each (rows,). The last five are None unless statistics were asked for."""

    anchor: Tensor
    sum: Tensor  # sum of e_v
    offset: Tensor  # the stored exponentials are exp(t - anchor - offset)
    best: Tensor | None = None  # largest logit, the target's included
    best_index: Tensor | None = None  # its first column, as a vocabulary id
    weighted: Tensor | None = None  # sum of e_v (t_v - best)
    squares: Tensor | None = None  # sum of e_v^2
    total: Tensor | None = None  # sum of t_v, the target's left out


def merge(parts: Sequence[RowSums]) -> RowSums:
    """The sums over several parts of the vocabulary, in order.

    ``offset`` is that of the first part.
    """
    if len(parts) == 1:
        return parts[0]
    anchors = torch.stack([part.anchor for part in parts])
    anchor = anchors.amax(0)
    # Where no part moved away from the target's logit the shifts are 0 and nothing is rounded.
    shifts = torch.where(anchors == anchor, 0.0, anchors - anchor)
    factors = shifts.exp()
    sums = torch.stack([part.sum for part in parts])
    merged = RowSums(anchor, (sums * factors).sum(0), parts[0].offset)
    if parts[0].best is None:
        return merged
    fields = {
        name: torch.stack([_given(getattr(part, name)) for part in parts])
        for name in ("best", "best_index", "weighted", "squares", "total")
    }
    best, winner = fields["best"].max(0)
    below = torch.where(sums > 0, fields["best"] - best, 0.0)
    # Of equal maxima the part that comes first in the vocabulary wins.
    winner = (fields["best"] == best).to(torch.int8).argmax(0)
    return merged._replace(
        best=best,
        best_index=fields["best_index"].gather(0, winner[None])[0],
        weighted=(factors * (fields["weighted"] + below * sums)).sum(0),
        squares=(fields["squares"] * factors.square()).sum(0),
        total=fields["total"].sum(0),
    )


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError("parts must all carry statistics or none of them")
    return tensor


class TargetLogits(NamedTuple):
    """Of each row, (rows,)."""

    column: Tensor  # the target's column, -1 where it is elsewhere
    raw: Tensor  # its product plus bias; NaN where it is elsewhere
    logit: Tensor


class RowScores(NamedTuple):
    """What backward needs of each row beside its exponentials, each (rows,). The anchor need not be
    that of the exponentials."""

    logp: Tensor
    anchor: Tensor
    norm: Tensor  # exp(lse - anchor): p = exp(t - anchor) / norm
    log_norm: Tensor


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
    index = (torch.arange(exps.shape[0], device=exps.device), own.column.clamp(min=0))
    exps.index_put_(index, torch.where(own.column >= 0, value.to(exps.dtype), exps[index]))


def token_scores(
    outputs: tuple[str, ...],
    sums: RowSums,
    rows: RowScores,
    target: Tensor,
    target_logit: Tensor,
    vocab_size: int,
) -> TokenScores:
    """The requested outputs of each row."""
    values: dict[str, Tensor] = {}
    if "logp" in outputs:
        values["logp"] = rows.logp
    if "lse" in outputs:
        values["lse"] = rows.anchor + rows.log_norm
    if "entropy" in outputs:
        # -sum p log p = lse - best - sum p (t - best); a target at -inf carries no weight.
        p = rows.logp.exp()
        own = torch.where(p > 0, p * (target_logit - rows.anchor), 0.0)
        others = _given(sums.weighted) * (sums.anchor - rows.anchor).exp()
        values["entropy"] = rows.log_norm - others / rows.norm - own
    if "log_sum_sq_probs" in outputs:
        # Anchors and logits may lie far apart: their difference is rounded only after exp.
        top = rows.anchor.double()
        own = (2 * (target_logit - top)).exp()
        others = _given(sums.squares) * (2 * (sums.anchor - top)).exp()
        squares = (others + own).log() - 2 * rows.log_norm.double()
        values["log_sum_sq_probs"] = squares.to(rows.norm.dtype)
    if "mean_logits" in outputs:
        values["mean_logits"] = (_given(sums.total) + target_logit) / vocab_size
    if "is_top1" in outputs:
        values["is_top1"] = _given(sums.best_index) == target
    return TokenScores(**values)
