# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives whose losses depend on the batch, on a running state or on another module.

Every function takes ``(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
ref_rejected_logps)``, each ``(P,)`` sums over the scored tokens, and returns ``PairLosses`` whose
rewards are ``beta`` times the log-ratio, in input order. ``dp_group`` makes the batch that of all
its ranks, each with any number of pairs, none too; losses are this rank's, and where every rank
takes their sum, losses and gradients add up to those of one process with the whole batch. Every
rank must call the objective, and run backward. Running statistics are kept by the training
(``RunningMoments``) and given as 0-dim tensors. In the formulas x = log(policy / reference), w the
chosen and l the rejected response, and m = beta (x_w - x_l).
"""

from typing import Annotated, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .batch import count_and_sum, log_mean_exp, rows_of
from .registry import objective
from .results import PairLosses
from .signature import (
    Beta,
    Domain,
    Embeddings,
    Extra,
    Filled,
    Finite,
    Group,
    NotNegative,
    Positive,
    SharedLabelSmoothing,
    SharedPositive,
    State,
)
from .terms import (
    bradley_terry_nll,
    by_row,
    clamp,
    divisor,
    log_ratio,
    per_token,
    softplus,
    weighed,
)

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
    beta: Beta = 0.1,
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
    beta: SharedPositive = 0.01,
    label_smoothing: SharedLabelSmoothing = 0.0,
    dp_group: Group = None,
) -> PairLosses:
    """Alignment via optimal transport: policy margins shall dominate reference margins in order.

        m = beta (sort(s_w - s_l) - sort(r_w - r_l)),  s of the policy, r of the reference
        loss = softplus(-m) + eps m

    Melnyk et al. 2024, arXiv:2406.05882, paired. Losses are in sorted order: one belongs to no pair
    of the input. The default beta is TRL's recommendation. The ranks of ``dp_group`` sort all their
    pairs together, however many each holds, and their summed losses are those of one process; the
    host waits for the numbers of pairs. ``beta`` and ``label_smoothing`` are numbers only: sorted
    losses belong to no pair that could have its own.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    policy, reference = _sorted(
        log_ratio(policy_chosen_logps, policy_rejected_logps),
        log_ratio(cast(Tensor, ref_chosen_logps), ref_rejected_logps),
        dp_group,
    )
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
    beta: SharedPositive = 0.01,
    label_smoothing: SharedLabelSmoothing = 0.0,
    dp_group: Group = None,
) -> PairLosses:
    """Alignment via optimal transport: chosen log-ratios shall dominate rejected ones in order.

        m = beta (sort(x_w) - sort(x_l))
        loss = softplus(-m) + eps m

    Melnyk et al. 2024, arXiv:2406.05882, unpaired: chosen and rejected responses need not be to the
    same prompts. Losses are in sorted order. The default beta is TRL's recommendation. The ranks of
    ``dp_group`` sort all their pairs together, and ``beta`` and ``label_smoothing`` are numbers
    only, as in ``aot``.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    better, worse = _sorted(chosen, rejected, dp_group)
    losses = bradley_terry_nll(beta * (better - worse), label_smoothing)
    return PairLosses(losses, beta * chosen, beta * rejected)


def _sorted(first: Tensor, second: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Each in ascending order over all ranks, of which this rank keeps its share."""
    rows = rows_of(first, group)
    both = rows.gather(torch.stack([first, second], dim=1))
    smaller, larger = rows.own(torch.sort(both, dim=0, stable=True).values).unbind(1)
    return smaller, larger


@objective(unit="pair", scope="batch", needs_reference=True, loss_per_unit=False)
def dr_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    tau: SharedPositive = 1.0,
    dp_group: Group = None,
) -> PairLosses:
    """Distributionally robust DPO: pairs with a large loss, perhaps mislabelled, count less.

        loss = -tau log mean exp(-softplus(-m) / tau)

    Wu et al. 2024, arXiv:2407.07880 (beta' is tau; the default is the authors'). One value for the
    batch, repeated. As tau grows it becomes ``dpo``. Not direct reward optimization, DRO. The mean
    is over the pairs of all ranks of ``dp_group``, however many each holds, and the ranks' summed
    losses are those of one process. ``tau`` takes numbers only, the whole batch shares it.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    scaled = -softplus(-beta * (chosen - rejected)) / tau
    loss = -tau * log_mean_exp(scaled, dp_group)
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
    beta: Beta = 0.1,
    alpha: NotNegative = 0.6,
    beta_min: Positive = 0.001,
    dp_group: Group = None,
) -> PairLosses:
    """DPO with a dynamic beta: larger for batches whose pairs are easier than usual.

        beta' = max(beta (1 + alpha (mean (x_w - x_l) - running_mean)), beta_min)
        loss = P / kept softplus(-beta' (x_w - x_l)) where keep, else 0
        P = number of pairs,  kept = number of those with keep

    Wu et al. 2024, arXiv:2407.08639. The mean is over the kept pairs of the batch and beta' gets no
    gradient; ``running_mean`` is that of x_w - x_l. ``keep`` (bool, default all) leaves outliers
    out: the authors draw 80 % of the batch without replacement, with weights
    exp(-((gap - running_mean) / running_std)^2 / 2). With none kept the losses are 0. Default alpha
    is the paper's; rewards have the given beta. Means and numbers of pairs are over all ranks of
    ``dp_group``, however many pairs each holds, and the ranks' summed losses are those of one
    process.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    gap = chosen - rejected
    kept = torch.ones_like(gap) if keep is None else keep.bool().to(gap.dtype)
    pairs, sums = count_and_sum(torch.stack([kept, kept * gap.detach()], dim=1), dp_group)
    count, total = sums
    count = count.clamp(min=1)
    batch_beta = clamp(beta * (1 + alpha * (total / count - running_mean)), beta_min, None)
    losses = pairs / count * kept * softplus(-weighed(batch_beta, beta) * gap)
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
    beta: Beta = 2.5,
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
    target = gamma / divisor(beta) + alpha * (excess.detach() - running_mean) / spread
    gap = per_token(policy_chosen_logps, chosen_lengths) - per_token(
        policy_rejected_logps, rejected_lengths
    )
    losses = softplus(-beta * (gap - target.detach()))
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
    beta: Beta = 0.01,
    epsilon: Perturbation = 0.01,
) -> PairLosses:
    """DPO with a beta for each pair, moved by how its margin answers to a change of beta.

        step = 1 if margin_plus > s_w - s_l > margin_minus, -1 if reversed, else 0
        loss = softplus(-beta / (1 + epsilon step) (x_w - x_l))

    Lee et al. 2025, arXiv:2502.13177. ``margin_plus`` and ``margin_minus`` are s_w - s_l under
    logits (1 +- epsilon) policy -+ epsilon reference, that is under a slightly smaller and a
    slightly larger beta. Defaults are the authors'. After every optimizer step they set beta to
    ``epsilon_dpo_beta``; rewards have the given one. ``epsilon`` takes numbers only: one mixture of
    the logits serves the whole batch.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    margin = (policy_chosen_logps - policy_rejected_logps).detach()
    pair_beta = beta / (1 + epsilon * _steps(margin, margin_plus, margin_minus))
    losses = softplus(-pair_beta * (chosen - rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)


def epsilon_dpo_beta(
    beta: float,
    margin: Tensor,
    margin_plus: Tensor,
    margin_minus: Tensor,
    epsilon: float,
    *,
    dp_group: dist.ProcessGroup | None = None,
) -> float:
    """The beta of the next optimizer step of ``epsilon_dpo``: beta / (1 + epsilon mean step).

    Args:
        beta: the one of this step.
        margin: (P,), the policy's s_w - s_l, of all pairs of the step, of accumulated batches too.
        margin_plus, margin_minus: (P,), the extras of ``epsilon_dpo``, of the same pairs.
        epsilon: as given to ``epsilon_dpo``.
        dp_group: the mean is over the pairs of all its ranks; each holds any number, none too, and
            calls this. Reads the mean from the device.
    """
    steps = _steps(margin, margin_plus, margin_minus).flatten()
    pairs, total = count_and_sum(steps, dp_group)
    numbers: list[float] = torch.stack([total, pairs.clamp(min=1)]).tolist()
    return beta / (1 + epsilon * numbers[0] / numbers[1])


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
    beta: Beta = 0.1,
    tau: Positive = 0.5,
    dp_group: Group = None,
) -> PairLosses:
    """Relative preference optimization: each chosen response against all rejected ones.

        weight_ij = softmax_j(cos(prompt_embeddings_i, prompt_embeddings_j) / tau)
        loss = sum_j weight_ij softplus(-beta (x_wi - x_lj))

    Yin et al. 2024, arXiv:2402.10958. The pair's own rejected response is among the j. The authors'
    code has the weight inside softplus and a mean over j; its tau is the default here. As tau falls
    to 0 it becomes ``dpo`` when prompts differ. Not reward-aware or regularised RPO. The j run over
    the pairs of all ranks of ``dp_group``, however many each holds, and the ranks' summed losses
    are those of one process; the host waits for the numbers of pairs.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    directions = F.normalize(prompt_embeddings, dim=1)
    rows = rows_of(rejected, dp_group)
    rivals = rows.gather(torch.cat([directions, rejected[:, None]], dim=1))
    weights = torch.softmax(directions @ rivals[:, :-1].T / by_row(tau), dim=1)
    margins = by_row(beta) * (chosen[:, None] - rivals[:, -1])
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
    beta: Beta = 0.1,
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
