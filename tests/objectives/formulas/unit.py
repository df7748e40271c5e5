# SPDX-License-Identifier: Apache-2.0
"""Objectives on single responses, in float64 numpy, straight from the papers.

x = policy - ref, (B,). Each returns (losses (B,), rewards (B,)).
"""

import numpy as np

from .numeric import frozen, mean_per_token, sigmoid, softplus


def kto(policy, ref, *, labels, kl=None, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """2402.01306: desirable 1 - S(beta (x - kl)), undesirable 1 - S(beta (kl - x))."""
    x = policy - ref
    # Choice: a given kl is taken as it is (the caller clamps it); the batch mean is over all rows,
    # desirable or not, and detached.
    z = np.maximum(frozen(x).mean(), 0.0) if kl is None else kl
    desirable = desirable_weight * (1.0 - sigmoid(beta * (x - z)))
    undesirable = undesirable_weight * (1.0 - sigmoid(beta * (z - x)))
    return np.where(labels, desirable, undesirable), frozen(beta * x)


def bco(policy, ref, *, labels, delta=None, sample_weights=None, beta=0.1):
    """2404.04656: -log S(r - delta) where desirable, -log S(-(r - delta)) where not; r = beta x."""
    r = beta * (policy - ref)
    # Choice: The "batch mean of beta x" is the mean over all rows, unweighted and detached
    # (the paper's is the mean of the two classes' means: the same where they are equally many).
    d = frozen(r).mean() if delta is None else delta
    losses = np.where(labels, softplus(-(r - d)), softplus(r - d))
    # Choice: the weights multiply every row, of either class, and are not normalised.
    return losses * (1.0 if sample_weights is None else sample_weights), frozen(r)


def apo_zero_unpaired(
    policy, ref, *, labels, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
):
    """2408.06266: 1 - S(r) where desirable, S(r) where not; r = beta x."""
    r = beta * (policy - ref)
    desirable = desirable_weight * (1.0 - sigmoid(r))
    undesirable = undesirable_weight * sigmoid(r)
    return np.where(labels, desirable, undesirable), frozen(r)


def npo(policy, ref, *, beta=0.1):
    """2404.05868: -(2 / beta) log S(-beta x)."""
    r = beta * (policy - ref)
    return (2.0 / beta) * softplus(r), frozen(r)


def simnpo(policy, *, lengths, beta=2.5, gamma=0.0):
    """2410.07163: -(2 / beta) log S(-(beta / n) log p - gamma)."""
    # Choice: a response without tokens has a mean of 0, so a loss of (2 / beta) log(1 + e^gamma),
    # without gradient (design 5; the catalogue 9 would have a loss of 0).
    r = beta * mean_per_token(policy, lengths)
    return (2.0 / beta) * softplus(r + gamma), frozen(r)


def ddo(policy, ref, *, labels, beta=0.02, alpha=1.0):
    """2503.01103: -log S(beta x) of the real, -alpha log(1 - S(beta x)) of the generated."""
    r = beta * (policy - ref)
    return np.where(labels, softplus(-r), alpha * softplus(r)), frozen(r)


FORMULAS = {
    "kto": kto,
    "bco": bco,
    "apo_zero_unpaired": apo_zero_unpaired,
    "npo": npo,
    "simnpo": simnpo,
    "ddo": ddo,
}

_B = 12
_draw = np.random.default_rng(20)
_labels = _draw.permutation(np.arange(_B) < 7)  # 7 of one class, 5 of the other.
_lengths = _draw.integers(1, 30, _B)
_weights = _draw.uniform(0.5, 1.5, _B)

EXAMPLES = {
    "kto": [
        {"labels": _labels},
        {"labels": _labels, "kl": np.array(0.7), "beta": 0.5},
        {"labels": ~_labels, "desirable_weight": 1.3, "undesirable_weight": 0.6},
        {"labels": np.ones(_B, dtype=bool)},
    ],
    "bco": [
        {"labels": _labels},
        {"labels": _labels, "delta": np.array(-0.4), "beta": 0.3},
        {"labels": _labels, "sample_weights": _weights},
        {"labels": np.zeros(_B, dtype=bool), "delta": np.array(0.2), "sample_weights": _weights},
    ],
    "apo_zero_unpaired": [
        {"labels": _labels},
        {"labels": _labels, "beta": 0.4, "desirable_weight": 0.7, "undesirable_weight": 1.6},
    ],
    "npo": [{}, {"beta": 0.6}],
    "simnpo": [{"lengths": _lengths}, {"lengths": _lengths, "beta": 1.5, "gamma": 0.4}],
    "ddo": [
        {"labels": _labels},
        {"labels": _labels, "beta": 0.3, "alpha": 2.0},
        {"labels": _labels, "alpha": _weights},
    ],
}
