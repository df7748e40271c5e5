# SPDX-License-Identifier: Apache-2.0
"""The metrics beyond those of the objective, which ``outputs`` of ``preference_loss`` names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..scoring import TokenScores
from ..units.layouts import Arrangement
from .batch import Batch

# By the score of the policy that each is made of.
SCORES: Mapping[str, str] = {
    "entropy": "entropy",
    "mean_logits": "mean_logits",
    "accuracy": "is_top1",
}


def check_outputs(outputs: tuple[str, ...]) -> None:
    known = tuple(SCORES)
    if not isinstance(outputs, tuple | list) or any(name not in known for name in outputs):
        hint = f"; write ({outputs!r},)" if isinstance(outputs, str) else ""
        raise ValueError(f"outputs must be a tuple of names among {known}, got {outputs!r}{hint}")


def further_metrics(
    outputs: tuple[str, ...], policy: TokenScores, batch: Batch, arrangement: Arrangement
) -> dict[str, Tensor]:
    """Means over all scored tokens that no weight of 0 takes out; of pairs, logits by side and
    accuracy on the chosen one, as TRL has them."""
    split, metrics = arrangement.split, {}
    if "entropy" in outputs and policy.entropy is not None:
        metrics["entropy"] = _mean(batch.sums(policy.entropy.detach()), batch.counts())
    if "mean_logits" in outputs and policy.mean_logits is not None:
        sides = zip(split(batch.sums(policy.mean_logits)), split(batch.counts()), strict=True)
        means = [_mean(sums, lengths) for sums, lengths in sides]
        names = ("logits/chosen", "logits/rejected") if len(means) == 2 else ("logits/mean",)
        metrics |= dict(zip(names, means, strict=True))
    if "accuracy" in outputs and policy.is_top1 is not None:
        hits = batch.sums(policy.is_top1.float())
        metrics["mean_token_accuracy"] = _mean(split(hits)[0], split(batch.counts())[0])
    return metrics


def _mean(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums.sum() / lengths.sum().clamp(min=1)
