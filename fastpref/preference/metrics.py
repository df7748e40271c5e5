# SPDX-License-Identifier: Apache-2.0
"""The metrics beyond those of the objective, which ``outputs`` of ``preference_loss`` names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..objectives.checks import closest, hint
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
    are_names = isinstance(outputs, tuple | list)
    unknown = [name for name in outputs if name not in known] if are_names else []
    if are_names and not unknown:
        return
    remedy = "".join(hint(name, known) for name in unknown[:1])
    if isinstance(outputs, str):
        remedy = f"; write ({(closest(outputs, known) or (outputs,))[0]!r},)"
    raise ValueError(f"outputs must be a tuple of names among {known}, got {outputs!r}{remedy}")


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
