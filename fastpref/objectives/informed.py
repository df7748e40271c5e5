# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives that know more of a pair than which response is better.

Every function takes ``(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
ref_rejected_logps)``, each ``(P,)`` sums over the scored tokens, and what it knows of the pair by
keyword: scores, probabilities or entropies, ``(P,)``, which get no gradient. Returns ``PairLosses``
whose rewards are ``beta`` times the log-ratio. In the formulas x = log(policy / reference), w the
chosen and l the rejected response, and m = beta (x_w - x_l).
"""

from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor

from .registry import objective
from .results import PairLosses
from .signature import (
    Beta,
    Domain,
    Extra,
    ExtraFacts,
    NotNegative,
    NotNegativeExtra,
    PerUnit,
    Positive,
    PositiveExtra,
    Probabilities,
)
from .terms import bradley_terry_nll, divisor, log_ratio, mallows_dispersion, softplus, weighed

NormalisedEntropy: TypeAlias = Annotated[
    Tensor, ExtraFacts(shapes=("logps",), filled=True, domain=Domain(0.0, 1.0))
]
Damping: TypeAlias = Annotated[
    PerUnit,
    Domain(
        0.0, 1.0, includes=(1.0,), meaning="easy pairs are damped, not turned around", per_unit=True
    ),
]
Amplification: TypeAlias = Annotated[
    PerUnit, Domain(low=1.0, includes=(1.0,), meaning="hard pairs are amplified", per_unit=True)
]


@objective(unit="pair", scope="unit", needs_reference=True)
def sppo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_win_probs: Probabilities,
    rejected_win_probs: Probabilities,
    beta: Beta = 0.001,
) -> PairLosses:
    """Self-play preference optimization: a regression of log-ratios onto win probabilities.

        loss = (x_w - t_w)^2 / 2 + (x_l - t_l)^2 / 2
        t_w = (chosen_win_probs - 1/2) / beta
        t_l = (rejected_win_probs - 1/2) / beta

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with eta = 1 / beta. A win probability is that of
    beating a response of the current policy, estimated over several; the default beta is the
    authors'. The case of probabilities 1 and 0, without the factor 1/2, is ``sppo_hard``.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    chosen_error = chosen - (chosen_win_probs - 0.5) / divisor(beta)
    rejected_error = rejected - (rejected_win_probs - 0.5) / divisor(beta)
    losses = weighed((chosen_error.square() + rejected_error.square()) / 2, beta)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def madpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    reward_margin: Extra,
    beta: Beta = 0.1,
    c_min: Damping = 0.5,
    c_max: Amplification = 2.0,
    slope: Positive = 1.0,
    tau: Positive = 2.0,
) -> PairLosses:
    """Margin-adaptive DPO: weighs a pair by how hard a reward model finds it.

        h = reward_margin
        c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(slope (|h| - tau)))
        weight = sigmoid(c h) / sigmoid(h) if h > -tau else 1
        loss = weight softplus(-m)

    Rho 2025, arXiv:2510.05342. c falls from near c_max to c_min as |h| grows, through 1 at tau; it
    is 1 throughout where c_min or c_max is 1. Defaults are those of the author's code, whose
    experiments set tau = log 999.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    weights = madpo_weights(reward_margin, c_min, c_max, slope, tau)
    losses = weights * softplus(-beta * (chosen - rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)


def madpo_weights(
    reward_margin: Tensor, c_min: PerUnit, c_max: PerUnit, slope: PerUnit, tau: PerUnit
) -> Tensor:
    """(P,), as in ``madpo``."""
    strength = _strength(reward_margin.abs(), c_min, c_max, slope, tau)
    weights = torch.exp(softplus(-reward_margin) - softplus(-strength * reward_margin))
    return torch.where(reward_margin > -tau, weights, 1)


def _strength(size: Tensor, c_min: PerUnit, c_max: PerUnit, slope: PerUnit, tau: PerUnit) -> Tensor:
    """c of MADPO as a mean of c_min and c_max, which needs no division by 1 - c_min."""
    # Beyond 60 the other weight is lost to rounding anyway.
    low = (c_max - 1) * torch.exp((slope * (size - tau)).clamp(-60.0, 60.0))
    high = 1 - c_min
    return torch.where(low + high > 0, (c_min * low + c_max * high) / (low + high), 1)


@objective(unit="pair", scope="pair", needs_reference=True)
def da_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    reward_margin: Extra,
    beta: Beta = 0.1,
    alpha: Positive = 1.0,
) -> PairLosses:
    """Difficulty-aware DPO: an easy pair gets a larger beta, and so saturates sooner.

        loss = softplus(-(1 + |reward_margin|) alpha m)

    Qiu et al. 2026, arXiv:2601.00623; weight and defaults are those of the authors' code.
    ``reward_margin`` is the difference of the difficulty scores. How the authors vote on and
    normalise those scores is not in their code, and is left to the caller.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    ease = (1 + reward_margin.abs()) * alpha
    losses = softplus(-ease * beta * (chosen - rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def soft_label_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    preference_probs: Probabilities,
    beta: Beta = 0.1,
) -> PairLosses:
    """DPO on the probability q that the chosen response is preferred: the loss of DNO.

        loss = q softplus(-m) + (1 - q) softplus(m)
        q = preference_probs

    Rosset et al. 2024 (direct Nash optimization), arXiv:2404.03715, algorithm 1, where q is
    sigmoid(r_w - r_l) of expected win rates r. DNO-Prct is plain ``dpo`` on filtered pairs.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    margin = beta * (chosen - rejected)
    # Not softplus(-m) + (1 - q) m: with q near 0 that is a difference of large numbers.
    losses = preference_probs * softplus(-margin) + (1 - preference_probs) * softplus(margin)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def odpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    reward_margin: PositiveExtra,
    beta: Beta = 0.1,
    alpha: NotNegative = 1.0,
) -> PairLosses:
    """DPO with an offset: the margin must exceed what the scores say.

        loss = softplus(-(m - alpha log reward_margin))

    Amini et al. 2024, arXiv:2402.10571, with their scaling f = log. The offset is negative below a
    margin of 1. ``alpha`` 0 is DPO.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    offset = alpha * torch.log(reward_margin)
    losses = softplus(offset - beta * (chosen - rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def rpo_reward(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    reward_margin: Extra,
    beta: Beta = 0.1,
    eta: Positive = 1.0,
    distance: Literal["backward_kl", "forward_kl", "square"] = "backward_kl",
) -> PairLosses:
    """Reward-aware preference optimization: the margin shall equal that of a reward model.

        loss = distance(d, m),  d = eta reward_margin
        backward_kl = KL(Bernoulli(sigmoid(d)), Bernoulli(sigmoid(m)))
        forward_kl = KL(Bernoulli(sigmoid(m)), Bernoulli(sigmoid(d)))
        square = (m - d)^2

    Adler et al. 2024 (Nemotron-4 340B), arXiv:2406.11704; the names of the distances are those of
    NeMo-Aligner. Every distance is 0 at m = d. Not regularised, relative or iterative preference
    optimization, which are called RPO too.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    margin, target = beta * (chosen - rejected), eta * reward_margin
    if distance == "backward_kl":
        losses = _bernoulli_kl(target, margin)
    elif distance == "forward_kl":
        losses = _bernoulli_kl(margin, target)
    else:
        losses = (margin - target).square()
    return PairLosses(losses, beta * chosen, beta * rejected)


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(a)), Bernoulli(sigmoid(b)))."""
    yes = torch.sigmoid(a) * (softplus(-b) - softplus(-a))
    no = torch.sigmoid(-a) * (softplus(b) - softplus(a))
    return yes + no


@objective(unit="pair", scope="pair", needs_reference=True)
def mallows_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    ref_entropy: NormalisedEntropy,
    beta: Beta = 0.1,
    phi: Positive = 0.29,
    loss: Literal["dpo", "ipo"] = "dpo",
) -> PairLosses:
    """Mallows preference optimization: prompts on which opinions vary count less.

        c = -phi log(ref_entropy)
        loss = softplus(-c m)  ("dpo")  or  (c (x_w - x_l) - 1 / (2 beta))^2  ("ipo")

    Chen et al. 2024, arXiv:2405.14953. ``ref_entropy`` stands for the dispersion of the prompt: the
    reference's mean entropy over the tokens of both responses, divided by log V. Default phi and
    the scale of "ipo" are those of the authors' code.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    gap = mallows_dispersion(ref_entropy, phi) * (chosen - rejected)
    if loss == "dpo":
        losses = softplus(-beta * gap)
    else:
        losses = weighed((gap - 1 / (2 * divisor(beta))).square(), beta)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def mcts_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_q_values: NotNegativeExtra,
    rejected_q_values: NotNegativeExtra,
    beta: Beta = 0.1,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
) -> PairLosses:
    """Step-level DPO from tree search: label smoothing by how sure the search was.

        eps = min(1 - 1 / (1 + Q_l / max(1, Q_w)), 1/2)
        Q_w = chosen_q_values,  Q_l = rejected_q_values
        loss = softplus(-m) + eps m  or, "ipo",  (x_w - x_l - 1 / (2 beta))^2

    Xie et al. 2024, arXiv:2405.00451; form and default beta are those of the authors' code, which
    passes visit counts for Q. "ipo" does not use them, and sums over tokens where the code can
    divide by a power of the length. The authors score only the tokens after the point where the
    responses part: ``fastpref.sequences.divergence_mask``.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    if loss == "sigmoid":
        doubt = 1 - 1 / (1 + rejected_q_values / chosen_q_values.clamp(min=1))
        losses = bradley_terry_nll(beta * (chosen - rejected), doubt.clamp(max=0.5))
    else:
        losses = weighed((chosen - rejected - 1 / (2 * divisor(beta))).square(), beta)
    return PairLosses(losses, beta * chosen, beta * rejected)
