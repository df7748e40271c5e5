# SPDX-License-Identifier: Apache-2.0
"""Objectives on lists of responses, in float64 numpy, straight from the papers.

Every formula is written for one list: x (n,) holds policy - ref of the responses present (without
a reference: policy), and it returns (loss, rewards (n,)). FORMULAS holds the same over (G, K):
(policy, ref, *, mask=None, ...) -> (losses (G,), rewards (G, K)).
"""

import functools

import numpy as np

from .numeric import (
    frozen,
    log_sigmoid,
    log_softmax,
    logsumexp,
    mean_per_token,
    relu,
    sigmoid,
    softmax,
    softplus,
)

PER_RESPONSE = ("scores", "ranks", "lengths", "target_probs")


def over_lists(formula, reference=True):
    """The formula of one list, over a batch of lists."""

    @functools.wraps(formula)
    def batch(policy, *ref, mask=None, **options):
        assert len(ref) == reference
        x = policy - ref[0] if reference else policy
        mask = np.ones(x.shape, dtype=bool) if mask is None else mask
        losses, rewards = np.zeros(len(x), dtype=x.dtype), np.zeros(x.shape)
        for group, present in enumerate(mask):
            one = {
                name: value[group][present] if name in PER_RESPONSE and value is not None else value
                for name, value in options.items()
            }
            # Absent responses are left out as if they had never been in the list.
            loss, rewards[group, present] = formula(x[group][present], **one)
            # Choice: a list of one has loss 0 in every objective, with its SFT term, NCA's
            # absolute terms and -NDCG; so has an empty one. The rewards stay.
            losses[group] = loss if present.sum() > 1 else 0.0
        return losses, rewards

    return batch


def best_first(scores, ranks):
    """Indices from best to worst; ties keep input order."""
    assert (scores is None) != (ranks is None)
    return np.argsort(ranks if scores is None else -scores, kind="stable")


def positions(scores):
    """1 for the largest score, 2 for the next; ties keep input order."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def plackett_luce_of(u):
    """-log of the probability of the order in which u is given."""
    return sum(logsumexp(u[k:]) - u[k] for k in range(len(u)))


def lambda_loss(u, scores, ranks):
    """Sum over i better than j of |G_i - G_j| |1/D(rank_i) - 1/D(rank_j)| log(1 + e^-(u_i - u_j)),

    G = 2^score - 1, D(r) = log(1 + r).
    """
    # Choice: natural logarithm (said of rank_dpo, and LiPO prints log), a plain sum over
    # pairs, no division by the ideal DCG. Equal scores make no pair.
    gain, discount = 2.0**scores - 1.0, 1.0 / np.log(1.0 + ranks)
    weight = np.abs(np.subtract.outer(gain, gain) * np.subtract.outer(discount, discount))
    better = np.greater.outer(scores, scores)
    return np.sum(np.where(better, weight * softplus(-np.subtract.outer(u, u)), 0.0))


def plackett_luce(x, *, scores=None, ranks=None, beta=0.1):
    """2305.18290 A.3: -sum_k log(e^u_k / sum_{j >= k} e^u_j), best first, u = beta x."""
    u = beta * x
    return plackett_luce_of(u[best_first(scores, ranks)]), frozen(u)


def softmax_dpo(x, *, scores=None, ranks=None, beta=0.1):
    """2406.09215: -log S(-log sum_{l worse} e^(u_l - u_best))."""
    u = beta * x
    best, *worse = best_first(scores, ranks)
    return softplus(logsumexp(u[worse] - u[best])) if worse else 0.0, frozen(u)


def lipo(x, *, scores, beta=0.1, variant="lambda", alpha=10.0):
    """2402.01878: LambdaLoss with ranks by the current u (detached), or -ApproxNDCG."""
    u = beta * x
    if variant == "lambda":
        return lambda_loss(u, scores, positions(frozen(u))), frozen(u)
    # Choice: -NDCG, that is -DCG over the ideal DCG, as the name and allRank's code have it (the
    # line of the catalogue has no divisor); 0 where no response has a gain. Soft position
    # 1 + sum_{j != i} S(-alpha (u_i - u_j)), discount log2(1 + position).
    gain = 2.0**scores - 1.0
    ideal = np.sum(gain / np.log2(1.0 + positions(scores)))
    position = 0.5 + np.sum(sigmoid(-alpha * np.subtract.outer(u, u)), axis=1)
    dcg = np.sum(gain * np.log(2.0) / np.log(1.0 + position))
    return -dcg / ideal if ideal > 0 else 0.0, frozen(u)


def rank_dpo(x, *, scores, beta=0.1):
    """2410.18013: LambdaLoss with ranks by the scores."""
    u = beta * x
    return lambda_loss(u, scores, positions(scores)), frozen(u)


def adpo(x, *, scores=None, target_probs=None, tau=0.8, target_kind="boltzmann", target_tau=0.5):
    """2510.18913: -sum_i q_i log softmax(x / tau)_i."""
    assert (scores is None) != (target_probs is None)
    # Choice: rewards are x / tau, since 1 / tau stands where DPO has beta.
    u = x / tau
    if target_probs is not None:
        # Choice: what the target gives to absent responses is dropped, the rest made to sum to 1.
        # target_kind and target_tau are not looked at.
        q = target_probs / np.sum(target_probs)
    elif target_kind == "boltzmann":
        q = softmax(scores / target_tau)  # Choice: raw scores; whoever wants z-scores makes them.
    elif target_kind == "one_hot":
        q = np.arange(len(x)) == np.argmax(scores)
    else:
        # Choice: the target is the order of the scores, and the loss its Plackett-Luce likelihood,
        # summed over positions (of a distribution over the first place, Plackett-Luce is softmax,
        # which "boltzmann" is already; the authors' code takes the mean over positions).
        return plackett_luce_of(u[best_first(scores, None)]), frozen(u)
    return -np.sum(q * log_softmax(u)), frozen(u)


def nca(x, *, scores, beta=0.01, alpha=0.01):
    """2402.05369: -sum_i [softmax(scores / alpha)_i log S(u_i) + log S(-u_i) / n]."""
    u = beta * x
    return -np.sum(softmax(scores / alpha) * log_sigmoid(u) + log_sigmoid(-u) / len(u)), frozen(u)


def info_nca(x, *, scores, beta=0.01, alpha=0.01):
    """2402.05369: -sum_i softmax(scores / alpha)_i log softmax(u)_i."""
    u = beta * x
    return -np.sum(softmax(scores / alpha) * log_softmax(u)), frozen(u)


def exo_listwise(x, *, scores, beta=0.1, tau=0.1):
    """2402.00856: KL(softmax(u), softmax(scores / tau))."""
    u = beta * x
    return np.sum(softmax(u) * (log_softmax(u) - log_softmax(scores / tau))), frozen(u)


def pro(x, *, scores=None, ranks=None, lengths, tau=1.0, sft_weight=0.05):
    """2306.17492: -sum_k log softmax over the k-th and worse of sbar / tau, + weight nll(best)."""
    sbar = mean_per_token(x, lengths)
    order = best_first(scores, ranks)
    # Choice: nll is per token, -sbar, as `chosen_nll` is by default everywhere. Rewards
    # are sbar / tau, what the softmax compares.
    loss = plackett_luce_of(sbar[order] / tau) - sft_weight * sbar[order[0]]
    return loss, frozen(sbar / tau)


def rrhf(x, *, scores=None, ranks=None, lengths, sft_weight=1.0):
    """2304.05302: sum over pairs of relu(sbar_worse - sbar_better), + weight nll(best)."""
    sbar = mean_per_token(x, lengths)
    # Choice: of equal scores the earlier is the better (ties keep input order), so they
    # make a pair, which the paper's strict r_i < r_j does not. nll is per token, as for pro.
    s = sbar[best_first(scores, ranks)]
    pairs = sum(np.sum(relu(s[i + 1 :] - s[i])) for i in range(len(s)))
    return pairs - sft_weight * s[0], frozen(sbar)


def tpo(x, *, scores, beta=0.5):
    """2410.12854 (trees): LambdaLoss as in LiPO; x already weighted by step."""
    # Choice: ranks by the current u, detached, and gains 2^score - 1, both as in LiPO.
    u = beta * x
    return lambda_loss(u, scores, positions(frozen(u))), frozen(u)


def irpo(x, *, scores, ranks=None, beta=1.0, normalize=True):
    """2504.15477 (in-context): mean_i w_i log(1 + [/ (n-1)] sum_{j != i} e^(u_j - u_i)),

    w_i = (2^relevance_i - 1) / log2(1 + rank_i).
    """
    u, n = beta * x, len(x)
    # Choice: the position of a segment is counted among those present.
    ranks = np.arange(1, n + 1) if ranks is None else ranks
    weight = (2.0**scores - 1.0) / np.log2(1.0 + ranks)
    if n < 2:
        return 0.0, frozen(u)
    others = np.array([logsumexp(np.delete(u, i) - u[i]) for i in range(n)])
    return np.mean(weight * softplus(others - normalize * np.log(n - 1))), frozen(u)


REFERENCE_FREE = {"pro": pro, "rrhf": rrhf}
FORMULAS = {
    formula.__name__: over_lists(formula)
    for formula in (
        plackett_luce,
        softmax_dpo,
        lipo,
        rank_dpo,
        adpo,
        nca,
        info_nca,
        exo_listwise,
        tpo,
        irpo,
    )
} | {name: over_lists(formula, reference=False) for name, formula in REFERENCE_FREE.items()}

_G, _K = 5, 4
_draw = np.random.default_rng(21)
_scores = _draw.uniform(0.0, 1.0, (_G, _K))
_tied = _draw.integers(0, 3, (_G, _K)) / 2.0  # 0, 1/2 or 1.
_ranks = 1 + np.argsort(_draw.uniform(size=(_G, _K)), axis=1)
_relevance = _draw.integers(0, 4, (_G, _K)).astype(np.float64)
_lengths = _draw.integers(1, 30, (_G, _K))
_probs = _draw.dirichlet(np.ones(_K), _G)
# Full, a hole, two of four, one alone, one missing.
_mask = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0]], dtype=bool)

EXAMPLES = {
    "plackett_luce": [
        {"scores": _scores},
        {"ranks": _ranks, "beta": 0.5},
        {"scores": _tied, "mask": _mask},
    ],
    "softmax_dpo": [
        {"scores": _scores},
        {"ranks": _ranks, "beta": 0.5},
        {"scores": _tied, "mask": _mask},
    ],
    "lipo": [
        {"scores": _scores},
        {"scores": _tied, "mask": _mask, "beta": 0.5},
        {"scores": _scores, "variant": "approx_ndcg"},
        {"scores": _tied, "mask": _mask, "variant": "approx_ndcg", "alpha": 2.0},
    ],
    "rank_dpo": [{"scores": _scores}, {"scores": _tied, "mask": _mask, "beta": 0.5}],
    "adpo": [
        {"scores": _scores},
        {"scores": _scores, "target_kind": "one_hot", "tau": 2.0},
        {"scores": _tied, "mask": _mask, "target_kind": "plackett_luce", "tau": 3.0},
        {"target_probs": _probs, "mask": _mask, "tau": 5.0},
    ],
    "nca": [{"scores": _scores}, {"scores": _tied, "mask": _mask, "beta": 0.3, "alpha": 0.5}],
    "info_nca": [{"scores": _scores}, {"scores": _tied, "mask": _mask, "beta": 0.3, "alpha": 0.5}],
    "exo_listwise": [
        {"scores": _scores},
        {"scores": _tied, "mask": _mask, "beta": 0.4, "tau": 0.5},
    ],
    "pro": [
        {"scores": _scores, "lengths": _lengths},
        {"ranks": _ranks, "lengths": _lengths, "tau": 0.5, "sft_weight": 0.3},
        {"scores": _tied, "lengths": _lengths, "mask": _mask},
    ],
    "rrhf": [
        {"scores": _scores, "lengths": _lengths},
        {"ranks": _ranks, "lengths": _lengths, "sft_weight": 0.2},
        {"scores": _tied, "lengths": _lengths, "mask": _mask},
    ],
    "tpo": [{"scores": _scores}, {"scores": _tied, "mask": _mask, "beta": 0.2}],
    "irpo": [
        {"scores": _relevance},
        {"scores": _relevance, "ranks": _ranks, "beta": 0.3},
        {"scores": _relevance, "normalize": False, "beta": 0.5},
        {"scores": _relevance, "ranks": _ranks, "mask": _mask},
    ],
}
