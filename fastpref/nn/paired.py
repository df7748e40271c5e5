# SPDX-License-Identifier: Apache-2.0
"""What the losses of pairs share: one pass over the head, a likelihood term of the chosen responses
from the same log-probabilities, and the tuple they return."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..objectives import Objective
from ..preference import PreferenceOutput, preference_loss
from .checks import check_head

# The loss, then: chosen_logps (P,), rejected_logps (P,), mean logit of the chosen and of the
# rejected responses, the likelihood term, chosen_rewards (P,), rejected_rewards (P,), and what a
# loss adds to these.
Results: TypeAlias = tuple[Tensor, tuple[Tensor, ...]]


class Pairs(NamedTuple):
    """A batch of P pairs in 2 P rows, and rows beyond that belong to no pair."""

    number: int
    output: PreferenceOutput
    sums: Tensor  # of each row's log-probabilities, differentiable
    lengths: Tensor  # of each row, in scored tokens

    def halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected responses, (P,) each."""
        return rows[: self.number], rows[self.number : 2 * self.number]


class PairedLoss(torch.nn.Module):
    """Base of the losses on chosen rows followed by as many rejected ones.

    ``average_log_prob`` turns the sums of log-probabilities that are compared and returned into
    means over tokens. Mean logits are those of the scored tokens.
    """

    def __init__(
        self,
        ignore_index: int,
        alpha: float,
        compute_nll_loss: bool,
        average_log_prob: bool,
        compiled: bool,
        chunk_size: int,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.average_log_prob = average_log_prob
        self.compiled = compiled
        self.chunk_size = chunk_size

    def objective(self) -> Objective:
        """What the pairs are compared by, as this module is set."""
        raise NotImplementedError

    def evaluate(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, **keywords: Any
    ) -> Pairs:
        """The one pass. ``keywords`` are those of ``preference_loss``."""
        lengths = (target != self.ignore_index).sum(-1)
        objective, token_weights = self.objective(), None
        if self.average_log_prob and objective.reduction == "sum":
            token_weights = lengths.clamp(min=1).double().reciprocal()[:, None].expand_as(target)
        output = preference_loss(
            hidden,
            weight,
            target,
            objective,
            bias=bias,
            ignore_index=self.ignore_index,
            token_weights=token_weights,
            outputs=("mean_logits",),
            **keywords,
        )
        sums = output.logps if token_weights is None else output.logps * lengths
        return Pairs(output.losses.shape[0], output, sums, lengths)

    def nll(self, pairs: Pairs) -> Tensor:
        """Mean over all tokens of the chosen responses, or 0 where it is not wanted."""
        if not self.compute_nll_loss:
            return pairs.output.loss.new_zeros(())
        tokens = pairs.halves(pairs.lengths)[0].sum()
        return -pairs.halves(pairs.sums)[0].sum() / tokens.clamp(min=1)

    def results(self, pairs: Pairs, nll: Tensor, *more: Tensor) -> Results:
        """The loss and the tuple; ``more`` ends it."""
        output, shown = pairs.output, pairs.sums
        if self.average_log_prob:
            shown = shown / pairs.lengths.clamp(min=1)
        loss = output.loss + self.alpha * nll if self.compute_nll_loss else output.loss
        logits = output.metrics["logits/chosen"], output.metrics["logits/rejected"]
        rewards = output.chosen_rewards, output.rejected_rewards
        return loss, (*pairs.halves(shown), *logits, nll, *rewards, *more)


def check_pairs(weight: Tensor, hidden: Tensor, target: Tensor) -> None:
    check_head(hidden, weight, target)
    if len(target) % 2:
        raise ValueError(
            "_input must hold chosen rows and then as many rejected ones, an even number, got "
            f"{len(target)}; drop the row without a partner"
        )
