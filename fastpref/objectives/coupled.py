# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives whose losses depend on the batch, on a running state or on another module.

Every function takes ``(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
ref_rejected_logps)``, each ``(P,)`` sums over the scored tokens, and returns ``PairLosses`` whose
rewards are ``beta`` times the log-ratio, in input order. ``dp_group`` makes the batch that of all
its ranks, which must hold equal numbers of pairs; then losses are this rank's, and with gradients
averaged over ranks they are those of one process. Running statistics are kept by the training
(``RunningMoments``) and given as 0-dim tensors. In the formulas x = log(policy / reference), w the
chosen and l the rejected response, and m = beta (x_w - x_l).
"""

from typing import Annotated, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import gather, own
from .registry import objective
from .results import PairLosses
from .signature import (
    Domain,
    Embeddings,
    Extra,
    Filled,
    Finite,
    Group,
    LabelSmoothing,
    NotNegative,
    Positive,
    State,
)
from .terms import bradley_terry_nll, log_ratio, per_token, softplus

Perturbation: TypeAlias = Annotated[
    float, Domain(0.0, 1.0, includes=(0.0,), meaning="beta / (1 - epsilon) must stay positive")
]


@objective(unit="pair", scope="running", needs_reference=True, loss_type="bco_pair")
def bco_pair(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    delta: State | None = None,
    beta: Positive = 0.1,
) -> PairLosses:
    """Binary classifier optimization: each reward against a running mean of all rewards.

        loss = softplus(-(beta x_w - delta)) + softplus(beta x_l - delta)

    Jung et al. 2024, arXiv:2404.04656. ``delta`` is the running mean of (beta x_w + beta x_l) / 2;
    None stands for 0, which is what TRL's loss of this name has. The default beta is TRL's.
    """
    chosen = beta * log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = beta * log_ratio(policy_rejected_logps, ref_rejected_logps)
    shift = 0.0 if delta is None else delta
    losses = softplus(shift - chosen) + softplus(rejected - shift)
    return PairLosses(losses, chosen, rejected)


@objective(unit="pair", scope="batch", needs_reference=True, loss_per_unit=False, loss_type="aot")
def aot(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Positive = 0.01,
    label_smoothing: LabelSmoothing = 0.0,
    dp_group: Group = None,
) -> PairLosses:
    """Alignment via optimal transport: policy margins shall dominate reference margins in order.

        m = beta (sort(s_w - s_l) - sort(r_w - r_l)),  s of the policy, r of the reference
        loss = softplus(-m) + eps m

    Melnyk et al. 2024, arXiv:2406.05882, paired. Losses are in sorted order: one belongs to no pair
    of the input. The default beta is TRL's recommendation.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    policy = _sorted(log_ratio(policy_chosen_logps, policy_rejected_logps), dp_group)
    reference = _sorted(log_ratio(cast(Tensor, ref_chosen_logps), ref_rejected_logps), dp_group)
    losses = bradley_terry_nll(beta * (policy - reference), label_smoothing)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(
    unit="pair", scope="batch", needs_reference=True, loss_per_unit=False, loss_type="aot_unpaired"
)
def aot_unpaired(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Positive = 0.01,
    label_smoothing: LabelSmoothing = 0.0,
    dp_group: Group = None,
) -> PairLosses:
    """Alignment via optimal transport: chosen log-ratios shall dominate rejected ones in order.

        m = beta (sort(x_w) - sort(x_l))
        loss = softplus(-m) + eps m

    Melnyk et al. 2024, arXiv:2406.05882, unpaired: chosen and rejected responses need not be to the
    same prompts. Losses are in sorted order. The default beta is TRL's recommendation.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    margin = beta * (_sorted(chosen, dp_group) - _sorted(rejected, dp_group))
    losses = bradley_terry_nll(margin, label_smoothing)
    return PairLosses(losses, beta * chosen, beta * rejected)


def _sorted(values: Tensor, group: Group) -> Tensor:
    """This rank's part of the values of all ranks in ascending order; equal ones in input order."""
    return own(torch.sort(gather(values, group), stable=True).values, group)


@objective(unit="pair", scope="batch", needs_reference=True, loss_per_unit=False)
def dr_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Positive = 0.1,
    tau: Positive = 1.0,
    dp_group: Group = None,
) -> PairLosses:
    """Distributionally robust DPO: pairs with a large loss, perhaps mislabelled, count less.

        loss = -tau log mean exp(-softplus(-m) / tau)

    Wu et al. 2024, arXiv:2407.07880 (beta' is tau; the default is the authors'). One value for the
    batch, repeated. As tau grows it becomes ``dpo``. Not direct reward optimization, DRO.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    scaled = gather(-softplus(-beta * (chosen - rejected)) / tau, dp_group)
    count = torch.logsumexp(torch.zeros_like(scaled), dim=0)
    loss = -tau * (torch.logsumexp(scaled, dim=0) - count)
    return PairLosses(loss.expand_as(chosen), beta * chosen, beta * rejected)


@objective(unit="pair", scope="running", needs_reference=True)
def beta_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    running_mean: State,
    keep: Extra | None = None,
    beta: Positive = 0.1,
    alpha: NotNegative = 0.6,
    beta_min: Positive = 0.001,
    dp_group: Group = None,
) -> PairLosses:
    """DPO with a dynamic beta: larger for batches whose pairs are easier than usual.

        beta' = max(beta (1 + alpha (mean (x_w - x_l) - running_mean)), beta_min)
        loss = P / kept softplus(-beta' (x_w - x_l)), 0 where not kept

    Wu et al. 2024, arXiv:2407.08639. The mean is over the kept pairs of the batch and beta' gets no
    gradient; ``running_mean`` is that of x_w - x_l. ``keep`` (bool, default all) leaves outliers
    out: the authors draw 80 % of the batch without replacement, with weights
    exp(-((gap - running_mean) / running_std)^2 / 2). With none kept the losses are 0. Default alpha
    is the paper's; rewards have the given beta.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    gap = chosen - rejected
    kept = torch.ones_like(gap) if keep is None else keep.bool().to(gap.dtype)
    everyone = gather(torch.stack([kept, kept * gap.detach()], dim=1), dp_group)
    count, total = everyone.sum(dim=0)
    count = count.clamp(min=1)
    batch_beta = (beta * (1 + alpha * (total / count - running_mean))).clamp(min=beta_min)
    losses = len(everyone) / count * kept * softplus(-batch_beta * gap)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="running", needs_reference=True, reduction="mean")
def alpha_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    running_mean: State,
    running_std: State,
    chosen_lengths: Filled,
    rejected_lengths: Filled,
    beta: Positive = 2.5,
    gamma: Finite = 1.0,
    alpha: NotNegative = 0.1,
) -> PairLosses:
    """SimPO whose target margin grows with how far the policy has left the reference on the pair.

        d = x_w / n_w - x_l / n_l,  z = (d - running_mean) / running_std
        loss = softplus(-beta (sbar_w - sbar_l - sg[gamma / beta + alpha z]))

    Wu et al. 2024, arXiv:2410.10148, with sbar the policy's mean log-probability of a token and sg
    a stopped gradient. The statistics are those of d; where ``running_std`` is 0, z is 0.
    Defaults: beta and gamma as in SimPO, alpha from the paper's range 0.05 to 0.2. ``gamma`` is the
    margin itself, not its ratio to beta. Not ``alpha_po``, nor the alpha-divergence of ``f_dpo``.

    A response without scored tokens has mean 0.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    excess = per_token(chosen, chosen_lengths) - per_token(rejected, rejected_lengths)
    spread = torch.where(running_std > 0, running_std, torch.inf)
    target = gamma / beta + alpha * (excess.detach() - running_mean) / spread
    gap = per_token(policy_chosen_logps, chosen_lengths) - per_token(
        policy_rejected_logps, rejected_lengths
    )
    losses = softplus(-beta * (gap - target))
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="running", needs_reference=True)
def epsilon_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    margin_plus: Filled,
    margin_minus: Filled,
    beta: Positive = 0.01,
    epsilon: Perturbation = 0.01,
) -> PairLosses:
    """DPO with a beta for each pair, moved by how its margin answers to a change of beta.

        step = 1 if margin_plus > s_w - s_l > margin_minus, -1 if reversed, else 0
        loss = softplus(-beta / (1 + epsilon step) (x_w - x_l))

    Lee et al. 2025, arXiv:2502.13177. ``margin_plus`` and ``margin_minus`` are s_w - s_l under
    logits (1 +- epsilon) policy -+ epsilon reference, that is under a slightly smaller and a
    slightly larger beta. Defaults are the authors'. After every optimizer step they set beta to
    ``epsilon_dpo_beta``; rewards have the given one.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    margin = (policy_chosen_logps - policy_rejected_logps).detach()
    pair_beta = beta / (1 + epsilon * _steps(margin, margin_plus, margin_minus))
    losses = softplus(-pair_beta * (chosen - rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)


def epsilon_dpo_beta(
    beta: float, margin: Tensor, margin_plus: Tensor, margin_minus: Tensor, epsilon: float
) -> float:
    """The beta of the next optimizer step of ``epsilon_dpo``: beta / (1 + epsilon mean step).

    Margins are those of all pairs of the step, of all ranks and accumulated batches: ``margin`` is
    the policy's s_w - s_l, the others are the extras of ``epsilon_dpo``. Reads one number from the
    device.
    """
    steps = _steps(margin, margin_plus, margin_minus)
    return beta / (1 + epsilon * steps.sum().item() / max(steps.numel(), 1))


def _steps(margin: Tensor, margin_plus: Tensor, margin_minus: Tensor) -> Tensor:
    up = (margin_plus > margin) & (margin > margin_minus)
    down = (margin_plus < margin) & (margin < margin_minus)
    return up.to(margin.dtype) - down.to(margin.dtype)


@objective(unit="pair", scope="batch", needs_reference=True)
def relative_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    prompt_embeddings: Embeddings,
    beta: Positive = 0.1,
    tau: Positive = 0.5,
    dp_group: Group = None,
) -> PairLosses:
    """Relative preference optimization: each chosen response against all rejected ones.

        weight_ij = softmax_j(cos(prompt_i, prompt_j) / tau)
        loss = sum_j weight_ij softplus(-beta (x_wi - x_lj))

    Yin et al. 2024, arXiv:2402.10958. The pair's own rejected response is among the j. The authors'
    code has the weight inside softplus and a mean over j; its tau is the default here. As tau falls
    to 0 it becomes ``dpo`` when prompts differ. Not reward-aware or regularised RPO.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    directions = F.normalize(prompt_embeddings, dim=1)
    weights = torch.softmax(directions @ gather(directions, dp_group).T / tau, dim=1)
    margins = beta * (chosen[:, None] - gather(rejected, dp_group))
    losses = (weights * softplus(-margins)).sum(dim=1)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def ofs_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    other_chosen_logps: Extra,
    other_rejected_logps: Extra,
    beta: Positive = 0.1,
    alpha: NotNegative = 0.1,
    role: Literal["fast", "slow"] = "fast",
) -> PairLosses:
    """Online fast-slow chasing DPO: two modules, of which the fast one shall stay ahead.

        chase = softplus(-beta (gap_fast - gap_slow)),  gap = s_w - s_l
        loss = softplus(-m) + alpha chase  ("fast")  or  - alpha chase  ("slow")

    Qi et al. 2024, arXiv:2406.05534. The policy is the module in training, which has the given
    role; ``other_*`` are log-probabilities of the other one. The slow module's loss is not bounded
    below: keep alpha small. Written from a third party's account of the equations; the default
    alpha was not confirmed at the source.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    policy_gap = policy_chosen_logps - policy_rejected_logps
    lead = policy_gap - (other_chosen_logps - other_rejected_logps)
    if role == "fast":
        chase = alpha * softplus(-beta * lead)
    else:
        chase = -alpha * softplus(beta * lead)
    losses = softplus(-beta * (chosen - rejected)) + chase
    return PairLosses(losses, beta * chosen, beta * rejected)
