# SPDX-License-Identifier: Apache-2.0
"""Responses in groups, one group a prompt: advantages, and the objective that needs none.

Groups are told apart by ``group_ids``, any integers in any order, which are compared with one
another, (B, B), and never read: nothing here waits for the device.
"""

import math
from typing import Annotated, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .batch import rows_of
from .checks import conversion
from .registry import objective
from .results import TokenLosses
from .signature import (
    Domain,
    Extra,
    Group,
    Identifiers,
    Outcomes,
    SharedNotNegative,
    SharedPositive,
)
from .terms import per_token, saturating_exp, saturating_expm1

Temperature: TypeAlias = Annotated[float, Domain(0.0, math.inf, includes=(math.inf,))]


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize: Literal["std", "none"] = "std",
    dp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Rewards relative to those of the same prompt, (B,), as GRPO and its kin take them.

        "std":  (R - mean) / (std + 1e-4)        GRPO, Shao et al. 2024, arXiv:2402.03300
        "none":  R - mean                        Dr. GRPO, Liu et al. 2025, arXiv:2503.20783

    The standard deviation is the sample's (G - 1). A response alone in its group has advantage 0,
    and so have all of a group of equal rewards.

    Args:
        rewards: ``(B,)``; fp64 keeps its precision, others are taken in fp32.
        group_ids: ``(B,)`` integers, equal for responses to the same prompt.
        normalize: what the differences are divided by.
        dp_group: process group over which prompts may be spread: responses with equal ids are of
            one group, wherever they lie. Ranks hold any number of responses, none too; every rank
            calls this, and the host waits for their sizes.
    """
    _check_groups(rewards, group_ids)
    if normalize not in ("std", "none"):
        raise ValueError(f"normalize must be 'std' or 'none', got {normalize!r}")
    rewards = rewards.detach() if rewards.dtype == torch.float64 else rewards.detach().float()
    rows = rows_of(rewards, dp_group)
    all_rewards, all_ids = rows.gather(rewards), rows.gather(group_ids.long())
    return rows.own(_advantages(all_rewards, all_ids, normalize))


def _advantages(rewards: Tensor, group_ids: Tensor, normalize: str) -> Tensor:
    same = group_ids[:, None] == group_ids
    # Differences first: those of equal rewards are exactly 0.
    differences = torch.where(same, rewards[:, None] - rewards, 0)
    advantages = differences.sum(-1) / same.sum(-1)
    if normalize == "none":
        return advantages
    squares = torch.where(same, advantages.square(), 0).sum(-1)
    return advantages / (torch.sqrt(squares / (same.sum(-1) - 1).clamp(min=1)) + 1e-4)


@objective(unit="token", scope="batch", needs_reference=False, loss_per_unit=False)
def disco(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    rewards: Outcomes,
    group_ids: Identifiers,
    score: Literal["log_likelihood", "likelihood_ratio"] = "log_likelihood",
    tau: Temperature | None = None,
    delta: SharedNotNegative = 0.0001,
    kl_weight: SharedPositive = 1000.0,
    kl_estimator: Literal["low_var", "kl"] = "low_var",
    dp_group: Group = None,
) -> TokenLosses:
    """Discriminative constrained optimization: scores of right answers above those of wrong ones.

        J = (1/Q) sum_q [mean_+ s - tau log mean_- exp(s / tau)]
        loss = -J + (kl_weight / 2) max(0, KL - delta)^2
        q = each prompt,  Q = number of prompts
        s = mean_t log policy ("log_likelihood") or mean_t r ("likelihood_ratio")
        mean_+ = mean over the responses to q of rewards 1,  mean_- = over those of rewards 0
        KL = mean over all tokens of r - 1 - log r ("low_var") or -log r ("kl")

    Li et al. 2025, arXiv:2505.12366; r = policy / old. A prompt that lacks right or wrong answers
    adds nothing and counts in Q. KL is that of the tokens of all ranks. ``tau`` None is the
    authors' choice, 10 or, for ratios, 1; infinity takes the plain mean of the negatives (DisCO-b).
    The factor 1/2 is that of the gradient in the authors' code. An empty response has score 0.

    The loss of the batch is repeated; ``ratio`` is r, ``kl`` the estimate at each token, of the
    divergence from the old policy; nothing is clipped. The batch is that of all ranks of
    ``dp_group``, over which prompts may be spread; each holds any number of responses, none too,
    and their summed losses are those of one process. The host waits for the numbers of responses.
    ``tau``, ``delta`` and ``kl_weight`` take numbers only, the whole batch shares them.

    A response without scored tokens has mean 0.
    """
    scored = mask != 0
    logp = torch.where(scored, policy_token_logp, 0)
    old = logp.detach() if old_token_logp is None else torch.where(scored, old_token_logp, 0)
    log_ratio = logp - old
    ratio = torch.where(scored, saturating_exp(log_ratio), 0)
    lengths = scored.sum(-1)

    values, default_tau = (logp, 10.0) if score == "log_likelihood" else (ratio, 1.0)
    scores = per_token(values.sum(-1), lengths)
    if kl_estimator == "low_var":
        kl = saturating_expm1(log_ratio, limit=20.0) - log_ratio  # its square is finite in fp32
    else:
        kl = -log_ratio
    rows = rows_of(scores, dp_group)
    numbers = rows.gather(torch.stack([scores, rewards, kl.sum(-1)], dim=1))
    integers = rows.gather(torch.stack([group_ids.long(), lengths], dim=1))
    scores, rewards, kl_sums = numbers.unbind(1)
    ids, all_lengths = integers.unbind(1)
    gain = _discrimination(scores, rewards, ids, default_tau if tau is None else tau)
    mean_kl = per_token(kl_sums.sum(), all_lengths.sum())
    loss = kl_weight / 2 * torch.relu(mean_kl - delta).square() - gain
    return TokenLosses(loss.expand(lengths.shape), ratio, torch.zeros_like(scored), kl)


def _discrimination(scores: Tensor, rewards: Tensor, group_ids: Tensor, tau: float) -> Tensor:
    """J of the whole batch, 0-dim, from the scores, rewards and prompts of its responses, (B,)."""
    same = group_ids[:, None] == group_ids
    positive, negatives = rewards == 1, same & (rewards == 0)
    num_positives, num_negatives = (same & positive).sum(-1), negatives.sum(-1)
    # With the best negative subtracted, neither a small tau overflows nor a large one cancels.
    if not len(scores):
        return scores.sum()
    best = torch.where(negatives, scores.detach(), -math.inf).amax(-1)
    below = torch.where(negatives, scores - best[:, None], 0)
    if tau == math.inf:
        soft_mean = best + per_token(below.sum(-1), num_negatives)
    else:
        growth = per_token(torch.expm1(below / tau).sum(-1), num_negatives)
        soft_mean = best + tau * torch.log1p(growth)
    compared = positive & (num_negatives > 0)
    gains = torch.where(compared, scores - soft_mean, 0) / num_positives.clamp(min=1)
    places = torch.arange(group_ids.shape[0], dtype=torch.int64, device=group_ids.device)
    seen_before = (same & (places < places[:, None])).any(-1)
    return gains.sum() / (~seen_before).sum()


def _check_groups(rewards: Tensor, group_ids: Tensor) -> None:
    for name, value in (("rewards", rewards), ("group_ids", group_ids)):
        if not isinstance(value, Tensor):
            got = type(value).__name__
            raise TypeError(f"{name} must be a tensor, got {got}; {conversion(value)}")
    if group_ids.is_floating_point():
        raise TypeError(f"group_ids must be integers, got {group_ids.dtype}")
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            "rewards and group_ids must both be (B,), one value a response, got "
            f"{tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
