# SPDX-License-Identifier: Apache-2.0
"""Objectives on single responses, each good or bad by itself.

Every function takes ``(policy_logps, ref_logps)``, each ``(B,)`` sums over the scored tokens, and
returns ``UnitLosses`` whose rewards are ``beta`` times the log-ratio. ``labels`` is True where a
response is desirable. In the formulas x = log(policy / reference); of two signs the upper one is
for desirable responses.
"""

import torch
from torch import Tensor

from . import batch
from .registry import objective
from .results import UnitLosses
from .signature import Beta, Extra, Filled, Finite, Group, Labels, Positive, State
from .terms import divisor, log_ratio, per_token, softplus, weighed


@objective(unit="unit", scope="batch", needs_reference=True, loss_type="kto")
def kto(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    labels: Labels,
    kl: State | None = None,
    beta: Beta = 0.1,
    desirable_weight: Positive = 1.0,
    undesirable_weight: Positive = 1.0,
    dp_group: Group = None,
) -> UnitLosses:
    """Kahneman-Tversky optimization: a bounded value of each response against the batch's KL.

        loss = weight (1 - S(+-beta (x - kl)))
        weight = desirable_weight or undesirable_weight, by labels
        kl = max(0, mean of x over the batch), no gradient

    Ethayarajh et al. 2024, arXiv:2402.01306. The paper estimates ``kl`` on mismatched prompts and
    responses, as max(0, their mean x): pass that for the published loss (it is used as it is); by
    default the batch's own responses serve. The authors' advice for unequal labels: desirable
    weight times number of desirable responses, 1 to 3/2 times that product of the undesirable.
    The batch is that of all ranks of ``dp_group``, which hold any number of responses each, none
    too; their summed losses are those of one process.
    """
    ratios = log_ratio(policy_logps, ref_logps)
    if kl is None:
        kl = batch.mean(ratios.detach(), dp_group).clamp(min=0)
    margins = beta * (ratios - kl)
    losses = torch.where(
        labels.bool(),
        desirable_weight * torch.sigmoid(-margins),
        undesirable_weight * torch.sigmoid(margins),
    )
    return UnitLosses(losses, beta * ratios)


@objective(unit="unit", scope="running", needs_reference=True)
def bco(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    labels: Labels,
    delta: State | None = None,
    sample_weights: Extra | None = None,
    beta: Beta = 0.1,
    dp_group: Group = None,
) -> UnitLosses:
    """Binary classifier optimization: is the reward above or below a shift?

        loss = sample_weights softplus(-+(beta x - delta))
        delta = mean of beta x over the batch, no gradient

    Jung et al. 2024, arXiv:2404.04656. There ``delta`` is a running mean of the rewards, half of it
    from each label: pass that for the published loss. ``sample_weights`` are the density ratios
    that the paper puts on undesirable responses when the prompts of the two labels differ; here
    they multiply whatever row they are given for. The batch is that of all ranks of ``dp_group``,
    which hold any number of responses each, none too; their summed losses are those of one process.
    """
    rewards = beta * log_ratio(policy_logps, ref_logps)
    if delta is None:
        delta = batch.mean(rewards.detach(), dp_group)
    margins = rewards - delta
    losses = softplus(torch.where(labels.bool(), -margins, margins))
    if sample_weights is not None:
        losses = sample_weights * losses
    return UnitLosses(losses, rewards)


@objective(unit="unit", scope="unit", needs_reference=True, loss_type="apo_zero_unpaired")
def apo_zero_unpaired(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    labels: Labels,
    beta: Beta = 0.1,
    desirable_weight: Positive = 1.0,
    undesirable_weight: Positive = 1.0,
) -> UnitLosses:
    """Anchored preference optimization (zero) of single responses: KTO with its KL at 0.

        loss = weight (1 - S(+-beta x))
        weight = desirable_weight or undesirable_weight, by labels

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, whose two terms need no pair. For a policy
    that is worse than the desirable responses.
    """
    rewards = beta * log_ratio(policy_logps, ref_logps)
    losses = torch.where(
        labels.bool(),
        desirable_weight * torch.sigmoid(-rewards),
        undesirable_weight * torch.sigmoid(rewards),
    )
    return UnitLosses(losses, rewards)


@objective(unit="unit", scope="unit", needs_reference=True)
def npo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
) -> UnitLosses:
    """Negative preference optimization: unlearn every response of the batch.

        loss = (2 / beta) softplus(beta x)

    Zhang et al. 2024, arXiv:2404.05868. Gradient ascent on the likelihood as beta goes to 0.
    """
    rewards = beta * log_ratio(policy_logps, ref_logps)
    return UnitLosses(weighed((2 / divisor(beta)) * softplus(rewards), beta), rewards)


@objective(unit="unit", scope="unit", needs_reference=False, reduction="mean")
def simnpo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    lengths: Filled,
    beta: Beta = 2.5,
    gamma: Finite = 0.0,
) -> UnitLosses:
    """Simple negative preference optimization: NPO on mean log-probabilities, no reference.

        loss = (2 / beta) softplus(beta s / n + gamma)

    Fan et al. 2024, arXiv:2410.07163; s the summed log-probability of n tokens (0 for an empty
    response). Defaults are the authors' for TOFU. Rewards are beta s / n.

    A response without scored tokens has mean 0.
    """
    rewards = beta * per_token(policy_logps, lengths)
    losses = (2 / divisor(beta)) * softplus(rewards + gamma)
    return UnitLosses(weighed(losses, beta), rewards)


@objective(unit="unit", scope="unit", needs_reference=True)
def ddo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    labels: Labels,
    beta: Beta = 0.02,
    alpha: Positive = 1.0,
) -> UnitLosses:
    """Direct discriminative optimization: tell real responses from the reference's own.

        loss = softplus(-beta x) where labels, else alpha softplus(beta x)

    Zheng et al. 2025, arXiv:2503.01103; ``labels`` is False where the reference generated the
    response. The paper adds the means over real and over generated responses: twice
    ``losses.mean()`` where they are equally many.
    """
    rewards = beta * log_ratio(policy_logps, ref_logps)
    losses = torch.where(labels.bool(), softplus(-rewards), alpha * softplus(rewards))
    return UnitLosses(losses, rewards)
