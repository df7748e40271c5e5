# SPDX-License-Identifier: Apache-2.0
"""Of the differential information distribution of "Differential Information Distribution: a
Bayesian perspective on direct preference optimization" (arXiv:2505.23761): its entropy, and whether
two policies order pairs alike."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .checks import check_floats, wide


class DIDEntropy(NamedTuple):
    entropy: Tensor  # (G,) float64, nats
    effective_samples: Tensor  # (G,) float64, between 1 and K


def did_entropy(policy_logps: Tensor, ref_logps: Tensor) -> DIDEntropy:
    """The entropy of q(y) = (policy(y) / ref(y)) / sum_y' (policy(y') / ref(y')) for each prompt,
    estimated from samples of the policy.

    With x = log policy - log ref, samples y_k of the policy have importance weights proportional to
    e^x / policy = 1 / ref, all in log space:

        log Z = log mean_k 1 / ref(y_k),   H = log Z - sum_k w_k x_k,   w = softmax(-log ref).

    Of the paper it is the definition; the estimator is our own, as the paper's own proposal is not
    known to us. Weights of long responses are extreme: where ``effective_samples``, 1 / sum w^2, is
    near 1 the entropy is that of one response and means nothing.

    Args:
        policy_logps, ref_logps: (G, K) summed log-probabilities of K responses of each of G
            prompts, which the policy has sampled.
    """
    check_floats(2, "(G, K)", policy_logps=policy_logps, ref_logps=ref_logps)
    ref, ratio = wide(ref_logps), wide(policy_logps) - wide(ref_logps)
    log_weights = (-ref).log_softmax(1)
    log_z = (-ref).logsumexp(1) - math.log(ref.shape[1])
    entropy = log_z - (log_weights.exp() * ratio).sum(1)
    return DIDEntropy(entropy, (-(2 * log_weights).logsumexp(1)).exp())


def log_margin_order(margins_a: Tensor, margins_b: Tensor) -> Tensor:
    """How alike two policies order pairs: Spearman's rank correlation of their log margins, 0-dim
    float64 in [-1, 1]; NaN where one of them has no order.

    The paper's optimal rejected responses come from a sampler whose margins against the reference
    are ordered as those of the optimal policy; this measures it, and proves nothing.

    Args:
        margins_a, margins_b: (P,), such as log policy(chosen) - log policy(rejected), of the same
            pairs.
    """
    check_floats(1, "(P,)", margins_a=margins_a, margins_b=margins_b)
    first, second = (_ranks(wide(one)) for one in (margins_a, margins_b))
    first, second = first - first.mean(), second - second.mean()
    found: Tensor = (first * second).sum() / (first.square().sum() * second.square().sum()).sqrt()
    return found


def _ranks(values: Tensor) -> Tensor:
    """From 0; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    places: Tensor = (ends - (counts + 1) / 2).to(values.dtype)
    return places[inverse]
