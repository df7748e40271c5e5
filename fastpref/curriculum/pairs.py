# SPDX-License-Identifier: Apache-2.0
"""Pairs from lists of scored responses, and which of them to keep."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives.checks import flag, hint
from .checks import marks, number, numbers, same_shape, tensor

PAIRINGS = ("best_vs_rest", "all", "adjacent", "best_vs_worst")


class RankedPairs(NamedTuple):
    """Pairs, the widest gap first.

    - ``chosen_index``: (P,) int64, rows of the flattened lists.
    - ``rejected_index``: (P,) int64, the same of the rejected.
    - ``gap``: (P,), by how much the chosen one scores above.
    """

    chosen_index: Tensor
    rejected_index: Tensor
    gap: Tensor


def ranked_pairs(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    pairing: str = "best_vs_rest",
    min_gap: float = 0.0,
) -> RankedPairs:
    """Pairs of the responses to one prompt, the better scored chosen; the easiest first.

    Of a list ranked R1 > R2 > R3 > R4, "best_vs_rest" makes (R1, R4), (R1, R3), (R1, R2), those of
    Curry-DPO (Pattnaik et al. 2024, arXiv:2403.07230), which takes the gap of scores for easiness.
    DNO-Prct (Rosset et al. 2024, arXiv:2404.03715) keeps pairs by ``min_gap``, and by more:
    ``clear_margin``. "all" pairs every two, "adjacent" every two neighbours in rank,
    "best_vs_worst" the ends. Two of equal score are no pair. Waits for the device, as P depends on
    the scores.

    Args:
        scores: (G, K), higher is better.
        mask: (G, K), nonzero = there is such a response; None: all are.
        pairing: which two.
        min_gap: of scores, at least, >= 0.

    Returns:
        ``(chosen_index, rejected_index, gap)``: int64 row numbers g K + k into the flattened lists,
        and the gap; pairs of equal gaps in the order of their lists and ranks.
    """
    tensor("scores", scores, "(G, K)")
    present = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        present = marks("mask", mask, "scores", scores.shape)
    values = numbers("scores", scores.masked_fill(~present, 0), "(G, K)")
    min_gap = number("min_gap", min_gap, 0.0)
    if pairing not in PAIRINGS:
        known = ", ".join(PAIRINGS)
        raise ValueError(
            f"pairing must be one of {known}, got {pairing!r}{hint(pairing, PAIRINGS)}"
        )
    # Ranked from the best on, what is not there last.
    order = (-values).masked_fill(~present, math.inf).argsort(dim=-1, stable=True)
    ranked, there = values.gather(1, order), present.gather(1, order)
    better, worse = _ranks(pairing, there)
    gaps = ranked.gather(1, better) - ranked.gather(1, worse)
    keep = there.gather(1, better) & there.gather(1, worse) & (gaps > 0) & (gaps >= min_gap)
    start = torch.arange(len(values), dtype=torch.int64, device=values.device)[:, None]
    start = start * values.shape[1]
    rows = [(start + order.gather(1, one))[keep] for one in (better, worse)]
    gap = gaps[keep]
    widest = gap.argsort(descending=True, stable=True)
    return RankedPairs(rows[0][widest], rows[1][widest], gap[widest])


def _ranks(pairing: str, there: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the better and the worse of each pair, (G, pairs of a list); some of ranks that a
    list does not have."""
    size = there.shape[1]
    where: dict[str, Any] = {"dtype": torch.int64, "device": there.device}
    if pairing == "best_vs_worst":
        last = (there.sum(-1, keepdim=True) - 1).clamp(min=0)
        # A list of none has columns of none.
        return (torch.zeros_like(last), last) if size else (last[:, :0], last[:, :0])
    if pairing == "best_vs_rest":
        worse = torch.arange(1, max(size, 1), **where)
        better = torch.zeros_like(worse)
    elif pairing == "adjacent":
        worse = torch.arange(1, max(size, 1), **where)
        better = worse - 1
    else:
        better, worse = torch.triu_indices(size, size, 1, **where)
    return better.expand(len(there), -1), worse.expand(len(there), -1)


def clear_margin(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    own: Tensor | None = None,
    min_chosen: float = 5.0,
    min_gap: float = 2.0,
    min_own_gap: float = 1.0,
) -> Tensor:
    """Pairs that DNO-Prct trains on: a chosen response that is good, and by far the better one.

        score_w >= min_chosen  and  score_w - score_l >= min_gap (min_own_gap if w is the policy's)

    Rosset et al. 2024, arXiv:2404.03715, with the paper's thresholds on a judge's six points. Here
    is that filter alone, not the judge nor the replay of earlier iterations.

    Args:
        chosen_scores: (P,) of the judge.
        rejected_scores: (P,).
        own: (P,), nonzero = the policy itself wrote the chosen response; None: it wrote none.
        min_chosen: of a chosen response, at least.
        min_gap: of a pair whose chosen response another model wrote.
        min_own_gap: of one that the policy wrote.

    Returns:
        (P,) bool.
    """
    chosen = numbers("chosen_scores", chosen_scores, "(P,)")
    rejected = numbers("rejected_scores", rejected_scores, "(P,)")
    same_shape("rejected_scores", rejected, "chosen_scores", chosen.shape)
    low = number("min_chosen", min_chosen)
    gap, own_gap = number("min_gap", min_gap, 0.0), number("min_own_gap", min_own_gap, 0.0)
    needed = torch.full_like(chosen, gap)
    if own is not None:
        needed = needed.masked_fill(marks("own", own, "chosen_scores", chosen.shape), own_gap)
    return (chosen >= low) & (chosen - rejected >= needed)


def top_fraction(values: Tensor, fraction: float, *, largest: bool = True) -> Tensor:
    """The share of the values that is largest, or smallest.

    Razin et al. 2024 (arXiv:2410.08847) leave out the pairs of the largest CHES scores, which make
    chosen responses less likely: ``top_fraction(ches, 0.05, largest=False)`` keeps 5%.

    Args:
        values: (P,).
        fraction: in (0, 1].
        largest: or the smallest.

    Returns:
        (P,) bool, true at the nearest whole number to fraction P, one at least (where P > 0); of
        equal values the first.
    """
    ranked = numbers("values", values, "(P,)")
    fraction = number("fraction", fraction, 0.0, 1.0, open_low=True)
    largest = flag("largest", largest)
    if len(ranked) == 0:
        return torch.zeros_like(ranked, dtype=torch.bool)
    kept = max(1, math.floor(fraction * len(ranked) + 0.5))
    order = ranked.argsort(descending=largest, stable=True)
    return torch.zeros_like(ranked, dtype=torch.bool).index_fill(0, order[:kept], True)
