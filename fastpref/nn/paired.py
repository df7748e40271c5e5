# SPDX-License-Identifier: Apache-2.0
"""What the losses of pairs share: one pass over the head, a likelihood term of the chosen responses
from the same log-probabilities, and the tuple they return."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..objectives import Objective
from ..objectives.registry import Composite, Reduction
from ..objectives.results import Losses
from ..objectives.signature import ExtraFacts, Signature
from ..preference import PreferenceOutput, preference_loss
from .checks import check_head
from .configured import Configured

# The loss, then: chosen_logps (P,), rejected_logps (P,), mean logit of the chosen and of the
# rejected responses, the likelihood term, chosen_rewards (P,), rejected_rewards (P,), and what a
# loss adds to these.
SHARES = "likelihood_shares"  # the extra of an objective with its likelihood term
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

    def nll(self) -> Tensor:
        """Mean over all tokens of the chosen responses, 0-dim."""
        tokens = self.halves(self.lengths)[0].sum()
        return -self.halves(self.sums)[0].sum() / tokens.clamp(min=1)


class PairedLoss(Configured):
    """Base of the losses on chosen rows followed by as many rejected ones.

    ``average_log_prob`` turns the sums of log-probabilities that are compared and returned into
    means over tokens. Mean logits are those of the scored tokens.
    """

    whole: Objective

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

    def configure(self) -> None:
        super().configure()
        whole = _with_likelihood(self.objective) if self.compute_nll_loss else self.objective
        self.__dict__["whole"] = whole  # what the pairs are compared by, with the likelihood term

    def run(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, **keywords: Any
    ) -> Results:
        """The whole of a loss whose likelihood term is that of the targets themselves."""
        if self.compute_nll_loss:
            keywords["extras"] = {SHARES: self._shares(target)}
        pairs = self.evaluate(self.whole, weight, hidden, target, bias, **keywords)
        return self.results(pairs, pairs.output.loss, self._nll(pairs))

    def evaluate(
        self,
        objective: Objective,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        **keywords: Any,
    ) -> Pairs:
        """The one pass. ``keywords`` are those of ``preference_loss``."""
        lengths, token_weights = self._lengths(target), None
        if self._weighs_tokens(objective):
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

    def results(self, pairs: Pairs, loss: Tensor, nll: Tensor) -> Results:
        output, shown = pairs.output, pairs.sums
        if self.average_log_prob:
            shown = shown / pairs.lengths.clamp(min=1)
        logits = output.metrics["logits/chosen"], output.metrics["logits/rejected"]
        rewards = output.chosen_rewards, output.rejected_rewards
        return loss, (*pairs.halves(shown), *logits, nll, *rewards)

    def _nll(self, pairs: Pairs) -> Tensor:
        return pairs.nll() if self.compute_nll_loss else pairs.output.loss.new_zeros(())

    def _lengths(self, target: Tensor) -> Tensor:
        return (target != self.ignore_index).sum(-1)

    def _weighs_tokens(self, objective: Objective) -> bool:
        """Whether means have to be made of the sums that the objective compares."""
        return self.average_log_prob and objective.reduction == "sum"

    def _shares(self, target: Tensor) -> Tensor:
        """(P,), factors that turn the chosen log-probabilities into shares of ``alpha`` times their
        mean over all tokens."""
        lengths = self._lengths(target).chunk(2)[0].double()
        shares = self.alpha * len(lengths) / lengths.sum().clamp(min=1)
        weighs = self._weighs_tokens(self.objective)
        return shares * (lengths if weighs else torch.ones_like(lengths))


def _with_likelihood(objective: Objective) -> Objective:
    return Objective(
        _WithLikelihood(objective),
        unit="pair",
        scope=objective.scope,
        needs_reference=objective.needs_reference,
    )


@dataclass(frozen=True)
class _WithLikelihood(Composite):
    """An objective and, in the losses, a share of the chosen responses' mean negative
    log-likelihood: apart from them its gradient would have the head scored again where the losses'
    is taken while they are scored."""

    objective: Objective
    signature: Signature = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        signature, settings = self.objective.signature, self.objective.hyperparameters
        known = {
            name: dataclasses.replace(one, default=settings[name])
            for name, one in signature.hyperparameters.items()
        }
        extras = {**signature.extras, SHARES: ExtraFacts(shapes=("logps",))}
        signature = dataclasses.replace(signature, hyperparameters=known, extras=extras)
        object.__setattr__(self, "signature", signature)

    @property
    def __name__(self) -> str:
        return self.objective.name

    @property
    def reduction(self) -> Reduction:
        return self.objective.reduction

    def __call__(self, *logps: Tensor | None, **keywords: Any) -> Losses:
        shares = keywords.pop(SHARES)
        result, chosen = self.objective(*logps, **keywords), logps[0]
        if chosen is None:
            raise RuntimeError("the log-probabilities were checked before")
        return result._replace(losses=result.losses - shares * chosen)

    def replace(self, **hyperparameters: Any) -> _WithLikelihood:
        return dataclasses.replace(self, objective=self.objective.replace(**hyperparameters))


def check_pairs(weight: Tensor, hidden: Tensor, target: Tensor) -> None:
    check_head(hidden, weight, target)
    if len(target) % 2:
        raise ValueError(
            "_input must hold chosen rows and then as many rejected ones, an even number, got "
            f"{len(target)}; drop the row without a partner"
        )
