# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives that warp the log-ratios to a reference model, or treat those of chosen and
rejected responses differently.

Every function takes ``(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
ref_rejected_logps)``, each ``(P,)`` sums over the scored tokens, and returns ``PairLosses`` whose
rewards are ``beta`` times the log-ratio as it is, not as reshaped. For a uniform reference pass
zeros. In the formulas x = log(policy / reference), S is the sigmoid, w the chosen and l the
rejected response.
"""

from typing import Annotated, Literal, TypeAlias, cast

import torch
from torch import Tensor

from .registry import objective
from .results import PairLosses
from .signature import Beta, Domain, FilledWithGrad, NotNegative, PerUnit, Positive
from .terms import (
    clamp,
    divisor,
    log_ratio,
    saturating_exp,
    saturating_expm1,
    sft_term,
    softplus,
    weighed,
)


@objective(unit="pair", scope="pair", needs_reference=True, loss_type="nca_pair")
def nca_pair(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.01,
) -> PairLosses:
    """Noise contrastive alignment of a pair: holds the chosen's likelihood up, not only the gap.

        r = beta x
        loss = softplus(-r_w) + softplus(r_w) / 2 + softplus(r_l) / 2

    Chen et al. 2024, arXiv:2402.05369, and their beta. Of a ranked list with scores: ``nca``.
    """
    chosen = beta * log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = beta * log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = softplus(-chosen) + (softplus(chosen) + softplus(rejected)) / 2
    return PairLosses(losses, chosen, rejected)


@objective(unit="pair", scope="unit", needs_reference=True, loss_type="sppo_hard")
def sppo_hard(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.001,
) -> PairLosses:
    """Self-play preference optimization with win probabilities 1 and 0.

        loss = (x_w - 1 / (2 beta))^2 + (x_l + 1 / (2 beta))^2

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7, and their beta (1 / eta). Trainers leave out the
    factor 1/2 that ``sppo``, the form with estimated probabilities, has; so does this.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    target = 1 / (2 * divisor(beta))
    losses = weighed((chosen - target).square() + (rejected + target).square(), beta)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="unit", needs_reference=True, loss_type="apo_zero")
def apo_zero(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
) -> PairLosses:
    """Anchored preference optimization that raises the chosen and lowers the rejected.

        loss = 1 - S(beta x_w) + S(beta x_l)

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7: for chosen responses better than the policy.
    Bounded: a response far on the wrong side has no gradient.
    """
    chosen = beta * log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = beta * log_ratio(policy_rejected_logps, ref_rejected_logps)
    return PairLosses(torch.sigmoid(-chosen) + torch.sigmoid(rejected), chosen, rejected)


@objective(unit="pair", scope="pair", needs_reference=True, loss_type="apo_down")
def apo_down(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
) -> PairLosses:
    """Anchored preference optimization that lowers both, the rejected more.

        loss = S(beta x_w) + 1 - S(beta (x_w - x_l))

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8: for chosen responses worse than the policy.
    """
    chosen = beta * log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = beta * log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
    return PairLosses(losses, chosen, rejected)


DivergenceOrder: TypeAlias = Annotated[
    PerUnit,
    Domain(0.0, 1.0, meaning="towards 0 the reverse KL, towards 1 the forward KL", per_unit=True),
]


def _alpha_with_its_divergence(
    *, beta: PerUnit, divergence: str, alpha: PerUnit | None
) -> str | None:
    if divergence == "alpha" and alpha is None:
        return "divergence='alpha' needs alpha, its order in (0, 1)"
    if divergence != "alpha" and alpha is not None:
        return f"alpha belongs to divergence='alpha'; leave it None with {divergence!r}"
    return None


def _divergence_slope(log_ratios: Tensor, divergence: str, alpha: PerUnit | None) -> Tensor:
    """f'(exp(x)) up to a constant, which a difference does not see."""
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "js":
        return -softplus(-log_ratios)
    order = 1.0 if divergence == "forward_kl" else cast(PerUnit, alpha)
    return -saturating_expm1(-order * log_ratios) / order


@objective(unit="pair", scope="pair", needs_reference=True, condition=_alpha_with_its_divergence)
def f_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    alpha: DivergenceOrder | None = None,
) -> PairLosses:
    """f-DPO: DPO for a policy that an f-divergence holds to the reference; phi(x) = f'(e^x).

        loss = softplus(-beta (phi(x_w) - phi(x_l)))
        phi(x) = x ("reverse_kl", DPO), -exp(-x) ("forward_kl"), log 2 - softplus(-x) ("js")
                 or -exp(-alpha x) / alpha ("alpha")

    Wang et al. 2023, arXiv:2309.16240. ``alpha`` is the paper's; TRL's f_alpha_divergence_coef is
    1 - alpha. exp(-x) is huge for responses that lost likelihood: the authors run "forward_kl" with
    beta 1e-5. Above exponent 60 it continues along its tangent.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    chosen_slope = _divergence_slope(chosen, divergence, alpha)
    rejected_slope = _divergence_slope(rejected, divergence, alpha)
    losses = softplus(-beta * (chosen_slope - rejected_slope))
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def chi_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    max_reward: Positive | None = None,
) -> PairLosses:
    """Chi-squared preference optimization: a link that also holds down what the policy prefers.

        phi(x) = e^x + x
        loss = softplus(-clip(beta (phi(x_w) - phi(x_l)), +-2 max_reward))

    Huang et al. 2024, arXiv:2407.13399, algorithm 1. ``max_reward`` bounds the true reward; pairs
    outside the clip have no gradient, and None does not clip. Above x = 60, e^x continues along its
    tangent.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    growth = saturating_exp(chosen) - saturating_exp(rejected)
    margin = beta * (growth + chosen - rejected)
    if max_reward is not None:
        margin = clamp(margin, -2 * max_reward, 2 * max_reward)
    return PairLosses(softplus(-margin), beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def flex_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_nll: FilledWithGrad | None = None,
    beta_chosen: Beta = 0.1,
    beta_rejected: Beta = 0.08,
    sft_weight: NotNegative = 0.0,
) -> PairLosses:
    """Flex-DPO: a beta for each side, and an optional likelihood term.

        m = beta_chosen x_w - beta_rejected x_l
        loss = softplus(-m) + sft_weight chosen_nll

    Yan et al. 2024 (3D-Properties), arXiv:2406.07327. The two factors are the paper's, their place
    in the margin is taken from reviews of it, and so is the default for the rejected. A smaller
    ``beta_rejected`` slows the fall of the rejected response. ``chosen_nll`` carries a gradient and
    is needed when ``sft_weight`` > 0. Rewards have the beta of their side. ``dpo_shift`` is the
    same margin by another name.

    A response without scored tokens has mean 0.
    """
    if chosen_nll is None and (isinstance(sft_weight, Tensor) or sft_weight > 0):
        raise ValueError("flex_dpo: sft_weight > 0 needs the extra chosen_nll")
    chosen = beta_chosen * log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = beta_rejected * log_ratio(policy_rejected_logps, ref_rejected_logps)
    sft = sft_term(sft_weight, chosen_nll, policy_chosen_logps, None)
    return PairLosses(softplus(rejected - chosen) + sft, chosen, rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def dpop(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    penalty: NotNegative = 50.0,
) -> PairLosses:
    """DPO-Positive: a chosen response less likely than under the reference counts against the pair.

        loss = softplus(-beta (x_w - x_l - penalty max(0, -x_w)))

    Pal et al. 2024 (Smaug), arXiv:2402.13228; ``penalty`` is their lambda. The penalty has no
    gradient at x_w = 0, where training starts.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = softplus(-beta * (chosen - rejected - penalty * torch.relu(-chosen)))
    return PairLosses(losses, beta * chosen, beta * rejected)


Shift: TypeAlias = Annotated[
    PerUnit,
    Domain(
        0.0, 1.0, includes=(1.0,), meaning="the weight of the rejected; 1 is DPO", per_unit=True
    ),
]


@objective(unit="pair", scope="pair", needs_reference=True)
def dpo_shift(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    shift: Shift,
) -> PairLosses:
    """DPO-Shift: the rejected response weighs less, so that the chosen's likelihood falls less.

        loss = softplus(-beta (x_w - shift x_l))

    Yang et al. 2025, arXiv:2502.07599; ``shift`` is their f(lambda), constant or on a schedule, and
    has no default. ``flex_dpo`` with beta_rejected = shift beta_chosen is the same.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = softplus(-beta * (chosen - shift * rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def cal_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.001,
    calibration_weight: NotNegative = 1.0,
) -> PairLosses:
    """Calibrated DPO: log-ratios are also drawn to +-1 / (2 beta), the scale of true rewards.

        loss = softplus(-(x_w - x_l)) + calibration_weight calibration
        calibration = (x_w - 1 / (2 beta))^2 + (x_l + 1 / (2 beta))^2

    Xiao et al. 2024, arXiv:2412.14516. The weight is the paper's 1; the authors' code has 0.5. The
    logistic term has no beta in either.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    target = 1 / (2 * divisor(beta))
    calibration = weighed((chosen - target).square() + (rejected + target).square(), beta)
    losses = softplus(rejected - chosen) + calibration_weight * calibration
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True, fixed_direction=True)
def tdpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_kl: FilledWithGrad,
    rejected_kl: FilledWithGrad,
    beta: Beta = 0.1,
    alpha: NotNegative = 0.5,
    version: Literal[1, 2] = 2,
) -> PairLosses:
    """Token-level DPO: the margin loses what the rejected drifts more than the chosen.

        loss = softplus(-beta (x_w - x_l - alpha (K_l - K_w)))
        K = sum over tokens of KL(reference, policy), over the whole vocabulary

    Zeng et al. 2024, arXiv:2404.11999, and their defaults. Version 2 is TDPO2, where K_w carries no
    gradient; version 1 is TDPO1, where it does and alpha is 1 whatever is given. Rewards are
    beta x; the authors log beta (x + K).
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    if version == 1:
        drift = rejected_kl - chosen_kl
    else:
        drift = alpha * (rejected_kl - chosen_kl.detach())
    losses = softplus(-beta * (chosen - rejected - drift))
    return PairLosses(losses, beta * chosen, beta * rejected)
