# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives that need no reference model.

Every function takes ``(policy_chosen_logps, policy_rejected_logps)``, each ``(P,)`` sums over the
scored tokens; the reference parameters are there for a common signature and must stay None. Returns
``PairLosses`` whose rewards are ``beta`` times the score that is compared. In the formulas s is the
summed and sbar = s / n the mean log-probability (0 for an empty response), w the chosen and l the
rejected response, and nll = ``chosen_nll``, by default -sbar_w, which carries a gradient.
"""

import torch
from torch import Tensor

from .batch import mean_and_std
from .registry import objective
from .results import PairLosses
from .signature import (
    Beta,
    Filled,
    FilledWithGrad,
    Finite,
    Group,
    LabelSmoothing,
    NotNegative,
    PerUnit,
)
from .terms import (
    bradley_terry_nll,
    log1mexp,
    mean_nll,
    per_token,
    saturating_expm1,
    sft_term,
    softplus,
)


@objective(unit="pair", scope="pair", needs_reference=False, reduction="mean")
def simpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    beta: Beta = 2.5,
    gamma: Finite = 1.0,
    label_smoothing: LabelSmoothing = 0.0,
) -> PairLosses:
    """Simple preference optimization: mean log-probabilities and a target margin.

        m = beta (sbar_w - sbar_l) - gamma
        loss = softplus(-m) + eps m

    Meng et al. 2024, arXiv:2405.14734, eq. 6. Defaults lie in the paper's ranges (beta 2 to 2.5,
    gamma / beta 0.25 to 0.55). ``gamma`` is the margin itself, not its ratio to beta.

    A response without scored tokens has mean 0.
    """
    chosen = beta * per_token(policy_chosen_logps, chosen_lengths)
    rejected = beta * per_token(policy_rejected_logps, rejected_lengths)
    losses = bradley_terry_nll(chosen - rejected - gamma, label_smoothing)
    return PairLosses(losses, chosen, rejected)


@objective(unit="pair", scope="pair", needs_reference=False, reduction="mean")
def alpha_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    alpha: Finite = 0.25,
    beta: Beta = 2.5,
    gamma: Finite = 0.1,
) -> PairLosses:
    """SimPO with a reward bent by alpha; alpha = 0 is ``simpo``.

        r = beta (1 - exp(-alpha sbar)) / alpha
        loss = softplus(-(r_w - r_l - gamma))

    Gupta et al. 2025 (AlphaPO), arXiv:2501.03884. ``gamma`` is the margin itself, not its ratio to
    beta. Defaults lie in the paper's ranges. Rewards are r. Not ``alpha_dpo``.

    A response without scored tokens has mean 0.
    """
    chosen = beta * _bent(per_token(policy_chosen_logps, chosen_lengths), alpha)
    rejected = beta * _bent(per_token(policy_rejected_logps, rejected_lengths), alpha)
    losses = softplus(gamma - (chosen - rejected))
    return PairLosses(losses, chosen, rejected)


def _bent(mean: Tensor, alpha: PerUnit) -> Tensor:
    """(1 - exp(-alpha mean)) / alpha; a line from the exponent 60 on, which fp32 needs."""
    # At 0 the limit, exact to rounding.
    if isinstance(alpha, Tensor):
        straight = alpha.abs() < 1e-20
        return torch.where(straight, mean, _bent_by(mean, torch.where(straight, 1, alpha)))
    return mean if abs(alpha) < 1e-20 else _bent_by(mean, alpha)


def _bent_by(mean: Tensor, alpha: PerUnit) -> Tensor:
    return -saturating_expm1(-alpha * mean) / alpha


@objective(unit="pair", scope="pair", needs_reference=False)
def cpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled | None = None,
    chosen_nll: FilledWithGrad | None = None,
    beta: Beta = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
    sft_weight: NotNegative = 1.0,
) -> PairLosses:
    """Contrastive preference optimization: DPO with a uniform reference, and an SFT term.

        m = beta (s_w - s_l)
        loss = softplus(-m) + eps m + sft_weight nll

    Xu et al. 2024, arXiv:2401.08417; defaults are TRL's. There, nll is the mean over all tokens of
    the batch, here the mean over responses of theirs. Neither constrained nor controllable PO.

    A response without scored tokens has mean 0.
    """
    chosen, rejected = beta * policy_chosen_logps, beta * policy_rejected_logps
    losses = bradley_terry_nll(chosen - rejected, label_smoothing)
    losses = losses + sft_term(sft_weight, chosen_nll, policy_chosen_logps, chosen_lengths)
    return PairLosses(losses, chosen, rejected)


@objective(unit="pair", scope="pair", needs_reference=False, reduction="mean")
def orpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    chosen_nll: FilledWithGrad | None = None,
    beta: Beta = 0.1,
    sft_weight: NotNegative = 1.0,
) -> PairLosses:
    """Odds ratio preference optimization: SFT and the log odds ratio of the two responses.

        log_odds_ratio = (sbar_w - sbar_l) - (log(1 - e^sbar_w) - log(1 - e^sbar_l))
        loss = sft_weight nll + beta softplus(-log_odds_ratio)

    Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7 (lambda is beta, default that of the authors'
    code). TRL and the authors take nll over prompt and response: pass that as ``chosen_nll``.

    A response without scored tokens has mean 0.
    """
    chosen = per_token(policy_chosen_logps, chosen_lengths)
    rejected = per_token(policy_rejected_logps, rejected_lengths)
    losses = beta * softplus(-log_odds_ratio(chosen, rejected))
    losses = losses + sft_term(sft_weight, chosen_nll, policy_chosen_logps, chosen_lengths)
    return PairLosses(losses, beta * chosen, beta * rejected)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Of two mean log-probabilities; finite where one of them is 0."""
    return (chosen - rejected) - (_log1m(chosen) - _log1m(rejected))


@objective(unit="pair", scope="unit", needs_reference=False, reduction="mean")
def asft(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    chosen_nll: FilledWithGrad | None = None,
    beta: Beta = 0.1,
    sft_weight: NotNegative = 1.0,
) -> PairLosses:
    """Aligned supervised fine-tuning: the likelihood of each response by itself, up or down.

        loss = sft_weight nll - beta (sbar_w + log(1 - e^sbar_l))

    Wang et al. 2024, arXiv:2409.10571: -log sigmoid(f_w) - log sigmoid(-f_l) of the log odds
    f = sbar - log(1 - e^sbar). The default beta was not confirmed at the source; it is that of
    ``orpo``, whose loss at the same settings is never larger. Not anchored SFT, also called ASFT.

    A response without scored tokens has mean 0.
    """
    chosen = per_token(policy_chosen_logps, chosen_lengths)
    rejected = per_token(policy_rejected_logps, rejected_lengths)
    losses = -beta * (chosen + _log1m(rejected))
    losses = losses + sft_term(sft_weight, chosen_nll, policy_chosen_logps, chosen_lengths)
    return PairLosses(losses, beta * chosen, beta * rejected)


def _log1m(mean: Tensor) -> Tensor:
    """log(1 - e^mean), constant above -1e-7: infinite at 0, with a slope of 1e7 when so near."""
    return log1mexp(mean.clamp(max=-1e-7))


@objective(unit="pair", scope="unit", needs_reference=False, reduction="mean")
def simper(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
) -> PairLosses:
    """Inverse perplexities, with nothing to set.

        loss = -exp(sbar_w) + exp(sbar_l)

    Xiao et al. 2025 (SimPER), arXiv:2502.00883. Rewards are sbar. The exponential of an empty
    response is 1.

    A response without scored tokens has mean 0.
    """
    chosen = per_token(policy_chosen_logps, chosen_lengths)
    rejected = per_token(policy_rejected_logps, rejected_lengths)
    return PairLosses(torch.exp(rejected) - torch.exp(chosen), chosen, rejected)


@objective(unit="pair", scope="pair", needs_reference=False)
def slic(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled | None = None,
    chosen_nll: FilledWithGrad | None = None,
    delta: NotNegative = 1.0,
    sft_weight: NotNegative = 0.1,
) -> PairLosses:
    """Sequence likelihood calibration: a hinge on log-probabilities, and an SFT term.

        loss = max(0, delta - s_w + s_l) + sft_weight nll

    Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425; defaults are those of HALOs, whose SFT term is
    summed over tokens. Rewards are s. The hinge on the DPO margin is ``hinge``.

    A response without scored tokens has mean 0.
    """
    losses = torch.relu(delta - policy_chosen_logps + policy_rejected_logps)
    losses = losses + sft_term(sft_weight, chosen_nll, policy_chosen_logps, chosen_lengths)
    return PairLosses(losses, policy_chosen_logps, policy_rejected_logps)


@objective(unit="pair", scope="batch", needs_reference=False, reduction="mean")
def amapo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    beta: Beta = 2.5,
    label_smoothing: LabelSmoothing = 0.0,
    dp_group: Group = None,
) -> PairLosses:
    """Adaptive-margin preference optimization: a target margin for pairs below the batch's mean.

        d = sbar_w - sbar_l,  mu = mean of d over the batch,  sd = its deviation
        m = beta d - sg[margin],  margin = beta exp(mu (mu - d) / sd) if d < mu else 0
        loss = softplus(-m) + eps m

    Deng et al. 2025, arXiv:2511.09385, with sg a stopped gradient; the default beta lies between
    the authors' 2 and 3. sd is a sample's; where it is 0, as of a single pair, so is the margin.
    The ranks of ``dp_group`` hold any number of pairs each, none too, and their summed losses are
    those of one process. A response without scored tokens has mean 0.
    """
    chosen = per_token(policy_chosen_logps, chosen_lengths)
    rejected = per_token(policy_rejected_logps, rejected_lengths)
    gap = chosen - rejected
    mean, spread = mean_and_std(gap.detach(), dp_group)
    below = (mean - gap.detach()).clamp(min=0)
    exponent = mean * below / spread
    # Cut at e^60, against overflow in fp32: the loss there is a line, whatever the margin.
    margin = beta * torch.where(below > 0, torch.exp(exponent.clamp(max=60.0)), 0)
    losses = bradley_terry_nll(beta * gap - margin.detach(), label_smoothing)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="unit", needs_reference=False, trains_rejected=False)
def sft(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled | None = None,
    chosen_nll: FilledWithGrad | None = None,
) -> PairLosses:
    """Mean negative log-likelihood of a token of the chosen response, a term for mixtures.

        loss = chosen_nll, by default -s_w / n_w

    Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155. ``chosen_nll`` carries a gradient. The loss
    compares nothing, so the rewards are the summed log-probabilities: accuracy then says which
    response the policy finds likelier.

    A response without scored tokens has mean 0.
    """
    losses = mean_nll(chosen_nll, policy_chosen_logps, chosen_lengths)
    return PairLosses(losses, policy_chosen_logps, policy_rejected_logps)
