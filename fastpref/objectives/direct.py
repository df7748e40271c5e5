# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives that are one loss of one margin between log-ratios to a reference model.

Every function takes ``(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
ref_rejected_logps)``, each ``(P,)`` sums over the scored tokens, and returns ``PairLosses`` whose
rewards are ``beta`` times the log-ratio. For a uniform reference pass zeros. In the formulas
x = log(policy / reference), m = beta (x_w - x_l) unless said, S is the sigmoid, w the chosen and l
the rejected response.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import objective
from .results import PairLosses
from .signature import (
    Beta,
    Domain,
    ExtraFacts,
    Filled,
    Finite,
    LabelSmoothing,
    NotNegative,
    PerUnit,
    Positive,
)
from .terms import (
    bradley_terry_nll,
    divisor,
    log_ratio,
    mallows_dispersion,
    per_token,
    saturating_exp,
    softplus,
    weighed,
)


@objective(unit="pair", scope="pair", needs_reference=True, loss_type="sigmoid")
def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
) -> PairLosses:
    """Direct preference optimization; with ``label_smoothing`` > 0, conservative DPO.

        loss = softplus(-m) + eps m, m = beta (x_w - x_l)
             = -(1 - eps) log S(m) - eps log S(-m)

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, "A note on DPO with
    noisy preferences". The default beta is the paper's. cDPO is bounded below and biased by design;
    the unbiased estimate under label noise is ``robust_dpo``.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = bradley_terry_nll(beta * (chosen - rejected), label_smoothing)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True, loss_type="robust")
def robust_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelSmoothing = 0.1,
) -> PairLosses:
    """Robust DPO (rDPO): unbiased when a share eps of the labels is flipped.

        loss = softplus(-m) - eps / (1 - 2 eps) m

    Chowdhury et al. 2024, arXiv:2403.00409, where it is ((1 - eps) softplus(-m) -
    eps softplus(m)) / (1 - 2 eps). Unbounded below: certain pairs keep being pushed apart. Neither
    ``r_dpo`` (length) nor conservative DPO, which is ``dpo`` with label_smoothing.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    margin = beta * (chosen - rejected)
    losses = softplus(-margin) - label_smoothing / (1 - 2 * label_smoothing) * margin
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True, reduction="mean", loss_type="ipo")
def ipo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled | None = None,
    rejected_lengths: Filled | None = None,
    beta: Beta = 0.1,
    normalize: Literal["mean", "sum"] = "mean",
) -> PairLosses:
    """Identity preference optimization: a regression of the log-ratio gap onto 1 / (2 beta).

        loss = (d - 1 / (2 beta))^2
        d = x_w / n_w - x_l / n_l  ("mean", lengths needed)  or  x_w - x_l  ("sum")

    Azar et al. 2023, arXiv:2310.12036, eq. 17 (beta is their tau). The equation has the sum; the
    mean over tokens is what the authors ran and trainers default to. An empty response counts as
    mean 0. Rewards are beta x, not divided by length.

    A response without scored tokens has mean 0.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    if normalize == "mean":
        gap = per_token(chosen, chosen_lengths) - per_token(rejected, rejected_lengths)
    else:
        gap = chosen - rejected
    losses = weighed((gap - 1 / (2 * divisor(beta))).square(), beta)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True, loss_type="hinge")
def hinge(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
) -> PairLosses:
    """Hinge loss on the DPO margin.

        loss = max(0, 1 - beta (x_w - x_l))

    Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425, with the normalised margin of Liu et al. 2023
    (RSO), arXiv:2309.06657. The gradient at the kink is 0.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = torch.relu(1 - beta * (chosen - rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)


TargetSmoothing: TypeAlias = Annotated[
    PerUnit,
    Domain(
        0.0,
        0.5,
        meaning="the target probability of the rejected; at 0 the loss is infinite",
        per_unit=True,
    ),
]


@objective(unit="pair", scope="pair", needs_reference=True, loss_type="exo_pair")
def exo_pair(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    label_smoothing: TargetSmoothing = 0.001,
) -> PairLosses:
    """Efficient exact optimization on pairs: the reverse KL from the policy to the smoothed label.

        q = S(m)
        loss = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)

    Ji et al. 2024, arXiv:2402.00856, eq. 16, and their eps. Least at S(m) = 1 - eps. The authors'
    code has log-labels 0 and -10 instead, which do not sum to 1.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    margin = beta * (chosen - rejected)
    log_won, log_lost = _log_target(label_smoothing)
    won = torch.sigmoid(margin) * (F.logsigmoid(margin) - log_won)
    lost = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - log_lost)
    return PairLosses(won + lost, beta * chosen, beta * rejected)


def _log_target(label_smoothing: PerUnit) -> tuple[PerUnit, PerUnit]:
    if isinstance(label_smoothing, Tensor):
        return torch.log1p(-label_smoothing), torch.log(label_smoothing)
    return math.log1p(-label_smoothing), math.log(label_smoothing)


@objective(unit="pair", scope="pair", needs_reference=True, loss_type="discopop")
def discopop(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.05,
    tau: Positive = 0.05,
) -> PairLosses:
    """DiscoPOP (log-ratio modulated loss): from the logistic to the exponential as m grows.

        s = S(m / tau)
        loss = (1 - s) softplus(-m) + s exp(-m)

    Lu et al. 2024, arXiv:2406.08414, eq. 5, and their defaults. Not convex: near m = 0 there are
    local optima.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    margin = beta * (chosen - rejected)
    # s exp(-m) as one exponential, whose exponent falls on both sides for tau < 1. For larger tau
    # it grows below m = 0, and saturates.
    exponential = saturating_exp(F.logsigmoid(margin / tau) - margin)
    losses = torch.sigmoid(-margin / tau) * softplus(-margin) + exponential
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(
    unit="pair", scope="pair", needs_reference=True, reduction="mean", loss_type="sigmoid_norm"
)
def sigmoid_norm(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    beta: Beta = 5.0,
) -> PairLosses:
    """Length-normalised DPO: the margin is between log-ratios per token.

        loss = softplus(-beta (x_w / n_w - x_l / n_l))

    Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, and their beta. An empty response counts as 0.
    Rewards are beta x, not divided by length.

    A response without scored tokens has mean 0.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    gap = per_token(chosen, chosen_lengths) - per_token(rejected, rejected_lengths)
    return PairLosses(softplus(-beta * gap), beta * chosen, beta * rejected)


_GPO_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda margin: softplus(-margin),
    "hinge": lambda margin: torch.relu(1 - margin),
    "square": lambda margin: (margin - 1).square(),
    "exponential": lambda margin: saturating_exp(-margin),
    "truncated_square": lambda margin: torch.relu(1 - margin).square(),
    "savage": lambda margin: torch.sigmoid(-margin).square(),
}


@objective(unit="pair", scope="pair", needs_reference=True)
def gpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    function: Literal[
        "logistic", "hinge", "square", "exponential", "truncated_square", "savage"
    ] = "logistic",
) -> PairLosses:
    """Generalized preference optimization: a classification loss f of the margin.

        loss = f(m)
        f(m) = softplus(-m) ("logistic", DPO), max(0, 1 - m) ("hinge", SLiC),
               (m - 1)^2 ("square", IPO), exp(-m) ("exponential"),
               max(0, 1 - m)^2 ("truncated_square") or 1 / (1 + e^m)^2 ("savage")

    Tang et al. 2024, arXiv:2402.05749. "square" is beta^2 times summed ``ipo`` at beta / 2. Above
    exponent 60 "exponential" continues along its tangent.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = _GPO_FUNCTIONS[function](beta * (chosen - rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def focal_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    gamma: NotNegative = 0.05,
) -> PairLosses:
    """FocalPO: DPO with less weight on pairs that are ranked wrongly.

        loss = S(m)^gamma softplus(-m)

    Liu et al. 2025, arXiv:2501.06645; the default gamma was not confirmed at the source. The
    modulation is the opposite of the focal loss of vision, which favours the hard examples. The
    weight carries a gradient: below m of about -1 / gamma the loss falls as m does, and training
    gives such pairs up.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    nll = softplus(-beta * (chosen - rejected))
    return PairLosses(torch.exp(-gamma * nll) * nll, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def r_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    beta: Beta = 0.1,
    alpha: NotNegative = 0.01,
) -> PairLosses:
    """Length-regularised DPO (R-DPO): length may explain its part of the preference.

        loss = softplus(-(m + alpha (n_w - n_l)))

    Park et al. 2024, arXiv:2403.19159; the default alpha was not confirmed at the source. The sign
    follows from the regularised reward r - alpha n; some code has the opposite. Not ``robust_dpo``.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    longer = (chosen_lengths - rejected_lengths).to(chosen.dtype)
    losses = softplus(-(beta * (chosen - rejected) + alpha * longer))
    return PairLosses(losses, beta * chosen, beta * rejected)


ReferenceShare: TypeAlias = Annotated[
    PerUnit,
    Domain(0.0, 1.0, includes=(0.0, 1.0), meaning="the share of the reference", per_unit=True),
]
NormalisedEntropy: TypeAlias = Annotated[
    Tensor, ExtraFacts(shapes=("logps",), domain=Domain(0.0, 1.0))
]


def _cauchy_nll(margin: Tensor) -> Tensor:
    """-log of the Cauchy distribution function, atan(m) / pi + 1/2, whose lower tail is kept."""
    return -torch.log(torch.atan2(torch.ones_like(margin), -margin) / math.pi)


@objective(unit="pair", scope="pair", needs_reference=True, reduction="mean")
def rainbow_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    ref_entropy: NormalisedEntropy | None = None,
    beta: Beta = 10.0,
    alpha: ReferenceShare = 0.25,
    gamma: Finite = 0.1,
    phi: Positive = 0.29,
    function: Literal["logistic", "cauchy"] = "logistic",
) -> PairLosses:
    """RainbowPO: length normalisation, a mixed reference, a home advantage and Mallows' dispersion.

        d = (s_w - alpha r_w) / n_w - (s_l - alpha r_l) / n_l - (1 - alpha) gamma
        c = -phi log(ref_entropy), or 1 without it
        loss = softplus(-beta c d) ("logistic") or -log(atan(beta c d) / pi + 1/2) ("cauchy")

    s and r are the log-probs of policy and reference. Zhao et al. 2024, arXiv:2410.04203, and the
    defaults of their code. ``ref_entropy`` is the reference's mean entropy over log V. An empty
    response counts as 0. Rewards are beta x, not divided by length.

    A response without scored tokens has mean 0.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    # (1 - alpha) s + alpha x = s - alpha r
    mixed_chosen = (1 - alpha) * policy_chosen_logps + alpha * chosen
    mixed_rejected = (1 - alpha) * policy_rejected_logps + alpha * rejected
    gap = per_token(mixed_chosen, chosen_lengths) - per_token(mixed_rejected, rejected_lengths)
    margin = beta * (gap - (1 - alpha) * gamma)
    if ref_entropy is not None:
        margin = mallows_dispersion(ref_entropy, phi) * margin
    losses = softplus(-margin) if function == "logistic" else _cauchy_nll(margin)
    return PairLosses(losses, beta * chosen, beta * rejected)
