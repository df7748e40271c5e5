# SPDX-License-Identifier: Apache-2.0
"""Objectives on the pairs of a ranked list.

Every function takes ``(policy_logps, ref_logps)``, each ``(G, K)`` sums over the scored tokens of K
responses, and returns ``ListLosses``; ``pro`` and ``rrhf`` need no reference, which must then stay
None. ``mask`` is False where a response is absent: whatever stands there reaches nothing, and its
reward is 0. A list of one has no pair: its loss is 0. In the formulas u = beta log(policy /
reference) are the rewards, sbar the mean log-probability (0 for an empty response), and i, j run
over those present.
"""

from typing import Literal

import torch
from torch import Tensor

from . import lists
from .registry import objective
from .results import ListLosses
from .signature import Beta, Extra, Filled, NotNegative, Positive, Ranks
from .terms import by_row, log_ratio, per_token


@objective(unit="list", scope="list", needs_reference=True)
def lipo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra,
    beta: Beta = 0.1,
    variant: Literal["lambda", "approx_ndcg"] = "lambda",
    alpha: Positive = 10.0,
) -> ListLosses:
    """Listwise preference optimization: LambdaRank on rewards, or a smooth NDCG.

        loss = sum_{scores_i > scores_j} lambda_ij softplus(-(u_i - u_j))
        lambda_ij = |G_i - G_j| |1 / log(1 + place_i) - 1 / log(1 + place_j)|
        G = 2^scores - 1,  place = rank by u, 1 the best

        "approx_ndcg": loss is -sum_i G_i / log2(1 + pos_i), over that of the ideal order
        pos_i = 1 + sum_{j != i} sigmoid(-alpha (u_i - u_j))

    Liu et al. 2024, arXiv:2402.01878. 2^scores must be finite; places carry no gradient. Equal
    scores make no pair; a list without gain has loss 0. The default of ``alpha`` (for
    "approx_ndcg") was not confirmed at the source.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    members = lists.compared(mask, rewards)
    relevance = lists.numbers(scores, members, rewards)
    if variant == "lambda":
        order = lists.ranked_before(rewards.detach(), None, members)
        return ListLosses(lists.lambda_nll(rewards, relevance, order, members), rewards)
    steepness = by_row(by_row(alpha))
    overtaken = torch.sigmoid(-steepness * lists.gaps(rewards))
    places = 1 + torch.where(lists.pairs(members), overtaken, 0).sum(-1)
    ideal_places = lists.positions(lists.ranked_before(relevance, None, members))
    gains = lists.gains(relevance)
    ideal = (gains / (1 + ideal_places.to(gains.dtype)).log2()).sum(-1)
    reached = (gains / (1 + places).log2()).sum(-1)
    losses = torch.where(ideal > 0, -reached / torch.where(ideal > 0, ideal, 1), 0)
    return ListLosses(losses, rewards)


@objective(unit="list", scope="list", needs_reference=True)
def rank_dpo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra,
    beta: Beta = 0.1,
) -> ListLosses:
    """RankDPO: DPO of all pairs, weighed by the true ranking.

        loss = sum_{scores_i > scores_j} Delta_ij softplus(-(u_i - u_j))
        Delta_ij = |G_i - G_j| |1 / log(1 + place_i) - 1 / log(1 + place_j)|
        G = 2^scores - 1,  place = rank by scores, 1 the best

    Karthik et al. 2024, arXiv:2410.18013, eq. 6. Scores are in [0, 1] (shares of comparisons won):
    LiPO ranks by the policy instead. Equal scores make no pair. The default beta was not confirmed
    at the source, nor was the logarithm, here the natural one.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    members = lists.compared(mask, rewards)
    order = lists.ranked_before(scores, None, members)
    relevance = lists.numbers(scores, members, rewards)
    return ListLosses(lists.lambda_nll(rewards, relevance, order, members), rewards)


@objective(unit="list", scope="list", needs_reference=True)
def tpo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra,
    beta: Beta = 0.5,
) -> ListLosses:
    """Tree preference optimization: LambdaRank on the step-weighted rewards of a tree's branches.

        loss = sum_{scores_i > scores_j} lambda_ij softplus(-(u_i - u_j))
        lambda_ij = |G_i - G_j| |1 / log(1 + place_i) - 1 / log(1 + place_j)|
        G = 2^scores - 1,  place = rank by u, 1 the best

    Liao et al. 2024, arXiv:2410.12854; not triple preference optimization. Give log-probabilities
    that are already step-weighted (``fastpref.sequences.step_weights``); beta is the authors'
    code's. The weights are those of LiPO: the paper's were not seen, and
    its code leaves them out and, by a sign, drives the ranking loss up.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    members = lists.compared(mask, rewards)
    order = lists.ranked_before(rewards.detach(), None, members)
    relevance = lists.numbers(scores, members, rewards)
    return ListLosses(lists.lambda_nll(rewards, relevance, order, members), rewards)


@objective(unit="list", scope="list", needs_reference=False, reduction="mean")
def pro(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra | None = None,
    ranks: Ranks | None = None,
    lengths: Filled,
    tau: Positive = 1.0,
    sft_weight: NotNegative = 0.05,
) -> ListLosses:
    """Preference ranking optimization: each response against all worse ones, and SFT on the best.

        loss = sum_k [log sum_{j >= k} exp(r_j) - r_k] + sft_weight nll(best)
        r = sbar / tau, in the given order, best first;  nll = -sbar

    Song et al. 2023, arXiv:2306.17492. Rewards are r. One temperature for all: the authors' code
    multiplies by the gaps of the rewards, and has 0.05 (K - 1)^2 times the summed likelihood for
    SFT, so that the default ``sft_weight`` is not confirmed for this form. Ties keep input order.

    A response without scored tokens has mean 0.
    """
    means = per_token(lists.masked(policy_logps, mask), lists.masked(lengths, mask))
    rewards = means / by_row(tau)
    order = lists.ranked_before(scores, ranks, lists.compared(mask, rewards))
    nll = torch.where(lists.first(order), -means, 0).sum(-1)
    losses = lists.plackett_luce_nll(rewards, order) + sft_weight * nll
    return ListLosses(losses, rewards)


@objective(unit="list", scope="list", needs_reference=False, reduction="mean")
def rrhf(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra | None = None,
    ranks: Ranks | None = None,
    lengths: Filled,
    sft_weight: NotNegative = 1.0,
) -> ListLosses:
    """Rank responses to align with human feedback: a hinge on all pairs, and SFT on the best.

        loss = sum_{j > i} max(0, sbar_j - sbar_i) + sft_weight nll(best)
        in the given order, best first;  nll = -sbar

    Yuan et al. 2023, arXiv:2304.05302. Rewards are sbar. The likelihood is per token, as in the
    authors' code; the paper's is summed. Ties keep input order and so make a pair, which they do
    not in the paper. The gradient at the kink is 0.

    A response without scored tokens has mean 0.
    """
    rewards = per_token(lists.masked(policy_logps, mask), lists.masked(lengths, mask))
    order = lists.ranked_before(scores, ranks, lists.compared(mask, rewards))
    slack = torch.where(order, -lists.gaps(rewards), 0).relu()
    nll = torch.where(lists.first(order), -rewards, 0).sum(-1)
    return ListLosses(slack.sum((-2, -1)) + sft_weight * nll, rewards)
