# SPDX-License-Identifier: Apache-2.0
"""What ``preference_loss`` returns, and the metrics beyond those of the objective."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..scoring import TokenScores
from .filling import Material
from .layouts import Arrangement

OUTPUTS = ("entropy", "mean_logits", "accuracy")


class _Fields(NamedTuple):
    loss: Tensor
    losses: Tensor
    rewards: Tensor
    logps: Tensor
    ref_logps: Tensor | None
    metrics: dict[str, Tensor]


class PreferenceOutput(_Fields):
    """What ``preference_loss`` returns.

    - ``loss``: 0-dim, or one a unit with ``reduction="none"``. Differentiable.
    - ``losses``: one a unit, (P,), (B,) or (G,). Detached.
    - ``rewards``: (B,), in row order. Detached.
    - ``logps``: (B,), the policy's sums in row order. Differentiable.
    - ``ref_logps``: (B,), or None without a reference. Detached.
    - ``metrics``: 0-dim tensors by the names that TRL logs. Detached.
    """

    arrangement: Arrangement | None = None

    @property
    def chosen_logps(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.logps, 0)

    @property
    def rejected_logps(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.logps, 1)

    @property
    def chosen_rewards(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.rewards, 0)

    @property
    def rejected_rewards(self) -> Tensor:
        """(P,), of pairs."""
        return self._side(self.rewards, 1)

    def _side(self, rows: Tensor, side: int) -> Tensor:
        if self.arrangement is None:
            raise AttributeError(
                "an output that was rebuilt from its fields no longer knows its layout; take "
                "chosen and rejected rows from what preference_loss returned"
            )
        sides = self.arrangement.split(rows)
        if len(sides) != 2:
            raise AttributeError("chosen and rejected rows are those of a pairwise objective")
        return sides[side]


def scores_of(outputs: tuple[str, ...]) -> set[str]:
    """The scores that these metrics are made of."""
    names = {"entropy": "entropy", "mean_logits": "mean_logits", "accuracy": "is_top1"}
    return {names[name] for name in outputs}


def further_metrics(outputs: tuple[str, ...], material: Material) -> dict[str, Tensor]:
    """Means over all scored tokens; of pairs, logits by side and accuracy on the chosen one, as
    TRL has them."""
    policy, batch, split = material.policy, material.batch, material.arrangement.split
    metrics = {}
    if "entropy" in outputs and policy.entropy is not None:
        metrics["entropy"] = _mean(batch.sums(policy.entropy.detach()), batch.lengths)
    if "mean_logits" in outputs and policy.mean_logits is not None:
        sides = zip(split(batch.sums(policy.mean_logits)), split(batch.lengths), strict=True)
        means = [_mean(sums, lengths) for sums, lengths in sides]
        names = ("logits/chosen", "logits/rejected") if len(means) == 2 else ("logits/mean",)
        metrics |= dict(zip(names, means, strict=True))
    if "accuracy" in outputs and policy.is_top1 is not None:
        hits = batch.sums(policy.is_top1.float())
        metrics["mean_token_accuracy"] = _mean(split(hits)[0], split(batch.lengths)[0])
    return metrics


def _mean(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums.sum() / lengths.sum().clamp(min=1)


def logp_of(scores: TokenScores) -> Tensor:
    if scores.logp is None:
        raise RuntimeError("logp was not asked for")
    return scores.logp
