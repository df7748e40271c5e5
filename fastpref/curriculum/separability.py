# SPDX-License-Identifier: Apache-2.0
"""Whether chosen and rejected responses can be told apart by where they come from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import count, number, numbers, same_shape
from .ridge import linear_smoother


class SeparabilityReport(NamedTuple):
    """How well a linear probe tells chosen from rejected responses, unseen ones; 1/2 is chance.

    - ``accuracy``: of single responses.
    - ``auc``: how often a chosen response scores above a rejected one, of any pair.
    - ``pair_accuracy``: how often the chosen one of a pair scores above its own rejected one.
    - ``standard_error``: of an accuracy at chance: beyond 1/2 by several, it is none.
    - ``chosen_scores``: (P,), of held-out chosen responses; about 1 where the probe says "chosen"
      and -1 where it says "rejected".
    - ``rejected_scores``: (P,), the same of the rejected.
    """

    accuracy: float
    auc: float
    pair_accuracy: float
    standard_error: float
    chosen_scores: Tensor
    rejected_scores: Tensor


def separability(
    chosen_features: Tensor,
    rejected_features: Tensor,
    *,
    folds: int = 5,
    ridge: float = 1e-2,
    seed: int = 0,
) -> SeparabilityReport:
    """A linear probe of chosen against rejected responses, cross-validated over pairs.

    "More is Less" (Wang et al. 2025, arXiv:2504.02193) finds that pairs from several models are
    linearly separable by their hidden states, and that training then learns whose response it is
    instead of what makes it better; pairs of one model are not. This is a probe for it, ridge
    regression on labels of 1 and -1, and no number of the paper's: what is near 1 asks for a look
    at where the responses come from. Waits for the device.

    Args:
        chosen_features: (P, H), mean hidden states of the chosen responses, say.
        rejected_features: (P, H).
        folds: 2 to P; both responses of a pair are in the same one.
        ridge: > 0, the penalty relative to the mean squared length of centred features.
        seed: of the folds.
    """
    chosen = numbers("chosen_features", chosen_features, "(P, H)")
    rejected = numbers("rejected_features", rejected_features, "(P, H)")
    same_shape("rejected_features", rejected, "chosen_features", chosen.shape)
    pairs = len(chosen)
    if pairs < 2:
        raise ValueError(f"chosen_features must be at least 2 pairs, got {pairs}")
    folds = count("folds", folds, 2)
    if folds > pairs:
        raise ValueError(f"folds must be at most the {pairs} pairs, got {folds}")
    ridge = number("ridge", ridge, 0.0, open_low=True)
    generator = torch.Generator(device="cpu").manual_seed(count("seed", seed, 0))
    order = torch.randperm(pairs, generator=generator, dtype=torch.int64, device="cpu")
    both = torch.stack([chosen.double(), rejected.double()], 1)  # (P, 2, H)
    scores = both.new_zeros(pairs, 2)
    for held in order.to(both.device).tensor_split(folds):
        kept = torch.ones(pairs, dtype=torch.bool, device=both.device).index_fill(0, held, False)
        train = both[kept].flatten(0, 1)
        mean = train.mean(0)
        smoother = linear_smoother(train - mean, both[held].flatten(0, 1) - mean, ridge)
        labels = train.new_tensor([1.0, -1.0]).repeat(len(train) // 2)
        scores[held] = (smoother @ labels).reshape(-1, 2)
    good, bad = scores.T.contiguous().unbind(0)
    return SeparabilityReport(
        accuracy=float(torch.stack([_above(good, 0.0), _above(-bad, 0.0)]).mean()),
        auc=_auc(good, bad),
        pair_accuracy=float(_above(good - bad, 0.0).mean()),
        standard_error=0.5 / math.sqrt(2 * pairs),
        chosen_scores=good.to(chosen.dtype),
        rejected_scores=bad.to(chosen.dtype),
    )


def _above(values: Tensor, threshold: float) -> Tensor:
    """1 above it, 1/2 on it."""
    return ((values > threshold).double() + (values >= threshold).double()) / 2


def _auc(good: Tensor, bad: Tensor) -> float:
    """Of all pairs of one chosen and one rejected response, ties counting half."""
    ranked = bad.sort().values
    below = torch.searchsorted(ranked, good, right=False).double()
    up_to = torch.searchsorted(ranked, good, right=True).double()
    return float((below + up_to).mean() / 2 / len(bad))
