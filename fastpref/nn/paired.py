# SPDX-License-Identifier: Apache-2.0
"""What the losses of pairs share: one pass over the head, a likelihood term of the chosen responses
from the same log-probabilities, and the tuple they return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import objectives
from ..objectives.modifiers import Modifier
from ..objectives.registry import catalogue, registered
from ..objectives.results import Losses
from ..objectives.signature import ExtraFacts
from ..preference import PreferenceOutput, preference_loss
from .checks import check_head
from .mean_logits import sums_of_mean_logits

# The loss, then: chosen_logps (P,), rejected_logps (P,), mean logit of the chosen and of the
# rejected responses, the likelihood term, chosen_rewards (P,), rejected_rewards (P,), and what a
# loss adds to these.
Results: TypeAlias = tuple[Tensor, tuple[Tensor, ...]]

SHARES = "likelihood_shares"  # the extra of an objective with its likelihood term


@dataclass(frozen=True)
class _WithLikelihood(Modifier):
    """An objective with a share of the chosen responses' mean negative log-likelihood in its
    losses. As a term beside them it would have the head scored again where the gradient of the
    losses is taken while they are scored."""

    @property
    def __name__(self) -> str:
        return self.objectives[0].name

    def own_extras(self) -> Mapping[str, ExtraFacts]:
        return {SHARES: ExtraFacts(shapes=("logps",))}

    def __call__(self, *logps: Tensor | None, **extras: Any) -> Losses:
        result: Losses = self.results(logps, extras)[0]
        return result._replace(losses=result.losses - extras[SHARES] * logps[0])


# By name, and made here: torch.compile cannot trace how an Objective is made.
_WITH_LIKELIHOOD = {
    one.name: _WithLikelihood((one,)).as_objective() for one in catalogue() if one.unit == "pair"
}


class Pairs(NamedTuple):
    """A batch of P pairs in 2 P rows, and rows beyond that belong to no pair."""

    number: int
    output: PreferenceOutput
    sums: Tensor  # of each row's log-probabilities, differentiable
    lengths: Tensor  # of each row, in scored tokens
    logits: Tensor  # (2 P,), of each row the mean logit over all its positions

    def halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected responses, (P,) each."""
        return rows[: self.number], rows[self.number : 2 * self.number]

    def nll(self) -> Tensor:
        """Mean over all tokens of the chosen responses, 0-dim."""
        tokens = self.halves(self.lengths)[0].sum()
        return -self.halves(self.sums)[0].sum() / tokens.clamp(min=1)


class PairedLoss(torch.nn.Module):
    """Base of the losses on chosen rows followed by as many rejected ones.

    ``average_log_prob`` turns the sums of log-probabilities that are compared and returned into
    means over tokens. Mean logits are over all positions, scored or not. Attributes may change
    after construction: every call reads them.
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

    def configuration(self) -> tuple[str, dict[str, Any]]:
        """The name of the objective and its hyperparameters, as the attributes are now.

        Raises ValueError where these do not go together.
        """
        raise NotImplementedError

    def check_configuration(self) -> None:
        """Raise ValueError or TypeError unless there is such an objective."""
        name, hyperparameters = self.configuration()
        objectives.get(name, **hyperparameters)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Results:
        """The mean loss of P pairs, as ``FusedLinearDPOLoss.forward`` without a reference."""
        check_pairs(lin_weight, _input, target)
        return self.run(lin_weight, _input, target, bias)

    def run(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, **keywords: Any
    ) -> Results:
        """The whole of a loss whose likelihood term is that of the targets themselves."""
        adds = self.compute_nll_loss
        pairs = self.evaluate(weight, hidden, target, bias, with_likelihood=adds, **keywords)
        loss = pairs.output.loss
        return self.results(pairs, loss, pairs.nll() if adds else loss.new_zeros(()))

    def evaluate(
        self,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        *,
        with_likelihood: bool,
        **keywords: Any,
    ) -> Pairs:
        """The one pass. ``keywords`` are those of ``preference_loss``."""
        name, hyperparameters = self.configuration()
        objective = _WITH_LIKELIHOOD[name] if with_likelihood else registered(name)
        lengths, token_weights = (target != self.ignore_index).sum(-1), None
        averages = self.average_log_prob and objective.reduction == "sum"
        if averages:
            token_weights = lengths.clamp(min=1).double().reciprocal()[:, None].expand_as(target)
        if with_likelihood:
            keywords["extras"] = {SHARES: self._shares(lengths, averages)}
        output = preference_loss(
            hidden,
            weight,
            target,
            objective,
            bias=bias,
            ignore_index=self.ignore_index,
            token_weights=token_weights,
            **keywords,
            **hyperparameters,
        )
        sums = output.logps if token_weights is None else output.logps * lengths
        number = output.losses.shape[0]
        logits = sums_of_mean_logits(hidden[: 2 * number], weight, bias) / max(1, target.shape[1])
        return Pairs(number, output, sums, lengths, logits)

    def results(self, pairs: Pairs, loss: Tensor, nll: Tensor) -> Results:
        """The tuple that is returned."""
        output, shown = pairs.output, pairs.sums
        if self.average_log_prob:
            shown = shown / pairs.lengths.clamp(min=1)
        logits = [side.sum() / max(1, pairs.number) for side in pairs.halves(pairs.logits)]
        rewards = output.chosen_rewards, output.rejected_rewards
        return loss, (*pairs.halves(shown), *logits, nll, *rewards)

    def _shares(self, lengths: Tensor, averages: bool) -> Tensor:
        """(P,), factors that turn the chosen log-probabilities, means where ``averages``, into
        shares of ``alpha`` times their mean over all tokens."""
        chosen = lengths.chunk(2)[0].double()
        shares = self.alpha * len(chosen) / chosen.sum().clamp(min=1)
        return shares * (chosen if averages else torch.ones_like(chosen))


def check_pairs(weight: Tensor, hidden: Tensor, target: Tensor) -> None:
    check_head(hidden, weight, target)
    if len(target) % 2:
        raise ValueError(
            "_input must hold chosen rows and then as many rejected ones, an even number, got "
            f"{len(target)}; drop the row without a partner"
        )
