# SPDX-License-Identifier: Apache-2.0
"""Objectives on lists: the likelihood of an order, of a winner, of a distribution.

Every function takes ``(policy_logps, ref_logps)``, each ``(G, K)`` sums over the scored tokens of K
responses, and returns ``ListLosses``. ``mask`` is False where a response is absent: whatever stands
there reaches nothing, and its reward is 0. An order is given by ``scores`` (larger is better) or
``ranks`` (1 = best); ties keep input order. A list of one compares nothing: its loss is 0. In the
formulas x = log(policy / reference), u = beta x are the rewards, and i, j run over those present.
"""

from typing import Literal

import torch
from torch import Tensor

from . import lists
from .registry import objective
from .results import ListLosses
from .signature import Beta, Extra, NotNegativeExtra, Positive, Ranks
from .terms import by_row, log_ratio, softplus


@objective(unit="list", scope="list", needs_reference=True)
def plackett_luce(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra | None = None,
    ranks: Ranks | None = None,
    beta: Beta = 0.1,
) -> ListLosses:
    """DPO of a ranking: the Plackett-Luce likelihood of the order, best first.

        loss = sum_k [log sum_{j >= k} exp(u_j) - u_k], in the given order

    Rafailov et al. 2023, arXiv:2305.18290, appendix A.3. DPO for a list of two. Summed over places,
    not averaged.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    order = lists.ranked_before(scores, ranks, lists.compared(mask, rewards))
    return ListLosses(lists.plackett_luce_nll(rewards, order), rewards)


@objective(unit="list", scope="list", needs_reference=True)
def softmax_dpo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra | None = None,
    ranks: Ranks | None = None,
    beta: Beta = 0.1,
) -> ListLosses:
    """Softmax DPO (S-DPO): the best response against all others at once.

        loss = log(1 + sum_{j != best} exp(u_j - u_best))

    Chen et al. 2024, arXiv:2406.09215. DPO for a list of two; the order of the others is unused.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    order = lists.ranked_before(scores, ranks, lists.compared(mask, rewards))
    losses = softplus(lists.lse_gap(rewards, order))
    return ListLosses(torch.where(lists.first(order), losses, 0).sum(-1), rewards)


@objective(unit="list", scope="list", needs_reference=True)
def adpo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra | None = None,
    target_probs: NotNegativeExtra | None = None,
    tau: Positive = 0.8,
    target_kind: Literal["boltzmann", "one_hot", "plackett_luce"] = "boltzmann",
    target_tau: Positive = 0.5,
) -> ListLosses:
    """Anchored DPO: cross-entropy of the list's softmax to a target, anchored at the reference.

        loss = -sum_i q_i log softmax_i(x / tau)
        q = softmax(scores / target_tau) ("boltzmann"), 1 for the best response ("one_hot")
            or target_probs made to sum to 1

    "plackett_luce" has the likelihood of the order by scores, of x / tau, in place of the sum.

    Wang 2025, arXiv:2510.18913 (the "adversarial" ADPO is another). Defaults are the paper's;
    rewards are x / tau. Scores are used as given: the paper standardises them in each list. DPO at
    beta 1 / tau for a list of two and a one-hot target.
    """
    rewards = lists.masked(log_ratio(policy_logps, ref_logps), mask) / by_row(tau)
    members = lists.compared(mask, rewards)
    if target_probs is not None and scores is None:
        target = lists.numbers(target_probs, members, rewards)
        target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    elif scores is None or target_probs is not None:
        given = "neither" if scores is None else "both"
        raise ValueError(f"adpo needs exactly one of scores and target_probs, got {given}")
    elif target_kind == "boltzmann":
        values = lists.numbers(scores, members, rewards)
        target = lists.softmax(values / by_row(target_tau), members)
    else:
        order = lists.ranked_before(scores, None, members)
        if target_kind == "plackett_luce":
            return ListLosses(lists.plackett_luce_nll(rewards, order), rewards)
        target = lists.first(order).to(rewards.dtype)
    losses = -(target * lists.log_softmax(rewards, members)).sum(-1)
    return ListLosses(losses, rewards)


@objective(unit="list", scope="list", needs_reference=True)
def nca(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra,
    beta: Beta = 0.01,
    alpha: Positive = 0.01,
) -> ListLosses:
    """Noise contrastive alignment: the rewards themselves, not only their differences.

        loss = -sum_i q_i log S(u_i) - mean_i log S(-u_i)
        q = softmax(scores / alpha)

    Chen et al. 2024, arXiv:2402.05369. ``alpha`` divides, as in the authors' code, which calls
    it the inverse of the paper's. Its default was not confirmed there: that has 1e-3 and 1e-4.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    members = lists.compared(mask, rewards)
    target = lists.softmax(lists.numbers(scores, members, rewards) / by_row(alpha), members)
    attraction = (target * softplus(-rewards)).sum(-1)
    return ListLosses(attraction + lists.mean(softplus(rewards), members), rewards)


@objective(unit="list", scope="list", needs_reference=True)
def info_nca(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra,
    beta: Beta = 0.01,
    alpha: Positive = 0.01,
) -> ListLosses:
    """InfoNCA: cross-entropy of the list's softmax to the softmax of the scores.

        loss = -sum_i q_i log softmax_i(u),  q = softmax(scores / alpha)

    Chen et al. 2024, arXiv:2402.05369. ``alpha`` divides, as in the authors' code, which calls
    it the inverse of the paper's. Its default was not confirmed there: that has 1e-3 and 1e-4. The
    loss of ``adpo`` at tau = 1 / beta and target_tau = alpha; softmax DPO as alpha goes to 0.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    members = lists.compared(mask, rewards)
    target = lists.softmax(lists.numbers(scores, members, rewards) / by_row(alpha), members)
    losses = -(target * lists.log_softmax(rewards, members)).sum(-1)
    return ListLosses(losses, rewards)


@objective(unit="list", scope="list", needs_reference=True)
def exo_listwise(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra,
    beta: Beta = 0.1,
    tau: Positive = 0.1,
) -> ListLosses:
    """Efficient exact optimization on rewards: reverse KL of the list's softmax to the scores'.

        loss = sum_i p_i (log p_i - log q_i)
        p = softmax(u),  q = softmax(scores / tau)

    Ji et al. 2024, arXiv:2402.00856 (EXO on rewards; beta and tau are their beta_pi and
    beta_r). The default of ``tau`` was not confirmed at the source.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    members = lists.compared(mask, rewards)
    log_policy = lists.log_softmax(rewards, members)
    log_target = lists.log_softmax(lists.numbers(scores, members, rewards) / by_row(tau), members)
    return ListLosses((log_policy.exp() * (log_policy - log_target)).sum(-1), rewards)


@objective(unit="list", scope="list", needs_reference=True)
def irpo(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    mask: Extra | None = None,
    scores: Extra,
    ranks: Ranks | None = None,
    beta: Beta = 1.0,
    normalize: Literal[True, False] = True,
) -> ListLosses:
    """In-context ranking preference optimization: the items of one response, by their relevance.

        loss = mean_i weight_i softplus(z_i)
        weight_i = (2^scores_i - 1) / log2(1 + ranks_i)
        z_i = log sum_{j != i} exp(u_j - u_i) - log(K - 1)

    Wu et al. 2025, arXiv:2504.15477; not iterative reasoning preference optimization. A list is a
    response, its K entries the summed log-probabilities of its segments; ``ranks`` are their places
    in it, by default in order. log(K - 1), of the segments that are there, is the authors' code,
    ``normalize=False`` the paper.
    """
    rewards = by_row(beta) * lists.masked(log_ratio(policy_logps, ref_logps), mask)
    members = lists.compared(mask, rewards)
    places = torch.where(members, members.cumsum(-1) if ranks is None else ranks, 1)
    relevance = lists.gains(lists.numbers(scores, members, rewards))
    weights = relevance / (1 + places.to(rewards.dtype)).log2()
    rivals = lists.lse_gap(rewards, lists.pairs(members))
    if normalize:
        others = members.sum(-1, keepdim=True) - 1
        rivals = rivals - others.clamp(min=1).to(rewards.dtype).log()
    return ListLosses(lists.mean(weights * softplus(rivals), members), rewards)
