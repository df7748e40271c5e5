# SPDX-License-Identifier: Apache-2.0
"""What is summed over each row of logits, how the sums of parts of the vocabulary (slabs, ranks)
become those of all of it, and the outputs that are made of them.

Every row has an anchor a; over the columns v of a tile but the target's, e_v = exp(t_v - a). Sums
of parts add up once they share an anchor. What a row has beside the sum of its e_v is a statistic,
an entry of ``STATISTICS``; kernels return the rows of ``SUMS`` and then those of ``STATISTICS``.

A new one is written in six files: here the entry, its field of ``RowSums``, and with the output
that it is for a field of ``TokenScores`` and a formula in ``token_scores``; its place in
csrc/cpu/row_kernels.h; and its sum in csrc/cpu/row_kernels.inl, csrc/cuda/row_kernels.cuh,
kernels/statistics.py and backends/torch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenScores(NamedTuple):
    """Per-token scores, each shaped like ``target`` and float32 (float64 for float64 products), or
    None.

    With p the softmax of the transformed logits t over the vocabulary and y the target:

    - ``logp``: log p[y]. Differentiable.
    - ``entropy``: -sum p log p, in nats. Differentiable.
    - ``log_sum_sq_probs``: log sum p^2.
    - ``mean_logits``: mean of t over the vocabulary, less the ids that a bias of -inf excludes.
      Differentiable.
    - ``is_top1``: bool, the target's logit is the greatest, the first of equal ones.
    - ``lse``: log sum exp t. Differentiable.

    Positions where ``target == ignore_index`` hold 0 (False).
    """

    logp: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    lse: Tensor | None = None


OUTPUTS: tuple[str, ...] = TokenScores._fields
DIFFERENTIABLE: tuple[str, ...] = ("logp", "entropy", "mean_logits", "lse")
PLAIN: frozenset[str] = frozenset({"logp", "lse"})  # made of the sum of a row's exponentials alone


class RowSums(NamedTuple):
    """Sums of one tile, each (rows,). The last five are None unless statistics were asked for."""

    anchor: Tensor
    sum: Tensor  # sum of e_v
    offset: Tensor  # the stored exponentials are exp(t - anchor - offset)
    best: Tensor | None = None  # largest logit, the target's included
    best_index: Tensor | None = None  # its first column, as a vocabulary id
    weighted: Tensor | None = None  # sum of e_v (t_v - best)
    squares: Tensor | None = None  # sum of e_v^2
    total: Tensor | None = None  # under a cap: sum of t_v, the target's left out

    @classmethod
    def of(cls, rows: Iterable[Tensor], best_index: Tensor | None) -> RowSums:
        """Of the rows that a kernel returns, as many as it summed."""
        if best_index is None:
            return cls(*rows)
        names = (*SUMS, *(one.name for one in STATISTICS))
        return cls(**dict(zip(names, rows, strict=False)), best_index=best_index)

    def moved(self, start: int) -> RowSums:
        """Of columns that follow ``start`` others."""
        if self.best_index is None or not start:
            return self
        return self._replace(best_index=self.best_index + start)


class RowScores(NamedTuple):
    """What backward needs of each row beside its exponentials, each (rows,). The anchor need not be
    that of the exponentials."""

    logp: Tensor
    anchor: Tensor
    norm: Tensor  # exp(lse - anchor): p = exp(t - anchor) / norm
    log_norm: Tensor


class Parts(NamedTuple):
    """Of parts of the vocabulary, each (parts, rows): what merges their statistics."""

    sum: Tensor
    factor: Tensor  # exp(anchor - the anchor of all)
    below: Tensor  # best - that of all, 0 where nothing weighs


def _largest(values: Tensor, parts: Parts) -> Tensor:
    return values.amax(0)


def _about_best(values: Tensor, parts: Parts) -> Tensor:
    return (parts.factor * (values + parts.below * parts.sum)).sum(0)


def _of_squares(values: Tensor, parts: Parts) -> Tensor:
    return (values * parts.factor.square()).sum(0)


def _of_logits(values: Tensor, parts: Parts) -> Tensor:
    return values.sum(0)


class Statistic(NamedTuple):
    name: str  # of its field
    merge: Callable[[Tensor, Parts], Tensor]  # values (parts, rows) to (rows,)
    capped: bool = False  # summed under a cap alone


SUMS = ("anchor", "sum", "offset")
# Those of a cap alone come last.
STATISTICS = (
    Statistic("best", _largest),
    Statistic("weighted", _about_best),
    Statistic("squares", _of_squares),
    Statistic("total", _of_logits, capped=True),
)


def summed(statistics: bool, capped: bool) -> tuple[Statistic, ...]:
    """What a pass sums that is asked for statistics or not, under a cap or not."""
    return tuple(one for one in STATISTICS if statistics and (capped or not one.capped))


def merge(parts: Sequence[RowSums]) -> RowSums:
    """The sums over several parts of the vocabulary, in order.

    ``offset`` is that of the first part.
    """
    if len(parts) == 1:
        return parts[0]
    anchors = torch.stack([part.anchor for part in parts])
    anchor = anchors.amax(0)
    # Where no part moved away from the target's logit the shifts are 0 and nothing is rounded.
    factors = torch.where(anchors == anchor, 0.0, anchors - anchor).exp()
    sums = torch.stack([part.sum for part in parts])
    merged = RowSums(anchor, (sums * factors).sum(0), parts[0].offset)
    if parts[0].best is None:
        return merged
    tops = torch.stack([_given(part.best) for part in parts])
    best = tops.amax(0)
    found = Parts(sums, factors, torch.where(sums > 0, tops - best, 0.0))
    # Of equal maxima the part that comes first in the vocabulary wins.
    first = (tops == best).to(torch.int8).argmax(0)
    columns = torch.stack([_given(part.best_index) for part in parts])
    values = {
        one.name: one.merge(torch.stack([_given(getattr(part, one.name)) for part in parts]), found)
        for one in STATISTICS
        if getattr(parts[0], one.name) is not None
    }
    return merged._replace(best_index=columns.gather(0, first[None])[0], **values)


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError("parts must all carry statistics or none of them")
    return tensor


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
