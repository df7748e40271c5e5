# SPDX-License-Identifier: Apache-2.0
"""Group policy objectives on tokens, in float64 numpy, straight from the papers.

(policy_token_logp, old_token_logp or None) (B, T) -> (losses (B,), ratio (B, T), is_clipped (B, T),
kl (B, T) or None). All but disco: mask (B, T), advantages (B,) or (B, T), ref_token_logp=None.
"""

import numpy as np

from .numeric import (
    clip,
    frozen,
    logsumexp,
    maximum,
    mean_per_token,
    minimum,
    relu,
    sigmoid,
)


def log_ratios(policy, old, mask):
    """log(policy / old), 0 where masked."""
    # Choice: no old policy means the policy itself, detached: a ratio of 1 with a gradient.
    return np.where(mask, policy - (frozen(policy) if old is None else old), 0.0)


def k3(policy, ref, mask):
    """http://joschu.net/blog/kl-approx.html: an estimate of KL(policy, ref) at every token."""
    if ref is None:
        return None
    d = np.where(mask, ref - policy, 0.0)
    return np.exp(d) - d - 1.0


def per_token(advantages):
    return advantages[:, None] if advantages.ndim == 1 else advantages


def with_kl(token_loss, kl, beta):
    # Choice: the penalty is added to the loss of every token, so it is averaged as that loss is
    # (TRL). It has a gradient through the policy. Without ref_token_logp there is none.
    return token_loss if kl is None else token_loss + beta * kl


def mean_in_sequence(token_loss, mask):
    """Mean over the tokens of each sequence; an empty sequence has 0 and counts in the batch."""
    return mean_per_token(np.sum(np.where(mask, token_loss, 0.0), axis=1), mask.sum(axis=1))


def mean_in_batch(token_loss, mask):
    """B * (sum over a sequence) / (tokens of the batch), so that the mean is over all tokens."""
    return len(mask) * np.sum(np.where(mask, token_loss, 0.0), axis=1) / max(mask.sum(), 1)


def beyond(value, low, high, advantages):
    """Where clipping to [low, high] takes the gradient away."""
    return ((value < low) & (advantages < 0)) | ((value > high) & (advantages > 0))


def results(losses, ratio, is_clipped, kl, mask):
    # Choice: 0, False and 0 at masked positions.
    ratio = np.where(mask, frozen(np.broadcast_to(ratio, mask.shape)), 0.0)
    kl = None if kl is None else np.where(mask, frozen(kl), 0.0)
    return losses, ratio, mask & is_clipped, kl


def corrected(kl, ratio, use_bias_correction_kl):
    """2512.02556: the estimate of the divergence times the importance ratio."""
    # Choice: the ratio carries a gradient, as in TRL.
    return kl if kl is None or not use_bias_correction_kl else kl * ratio


def ratios(policy, old, mask, level="token"):
    """By token, or one a sequence: the geometric mean of its tokens'."""
    logs = log_ratios(policy, old, mask)
    return np.exp(logs if level == "token" else mean_in_sequence(logs, mask)[:, None])


def clipped_surrogate(
    policy,
    old,
    mask,
    advantages,
    ref,
    aggregate,
    *,
    beta=0.0,
    epsilon_low=0.2,
    epsilon_high=0.2,
    delta=None,
    importance_sampling_level="token",
    use_bias_correction_kl=False,
):
    """1707.06347: -min(r A, clip(r, 1 - low, 1 + high) A); delta also caps r in the first term."""
    low, high = epsilon_low, epsilon_high
    a, kl = per_token(advantages), k3(policy, ref, mask)
    ratio = ratios(policy, old, mask, importance_sampling_level)
    kl = corrected(kl, ratio, use_bias_correction_kl)
    loss = -minimum(clip(ratio, None, delta) * a, clip(ratio, 1.0 - low, 1.0 + high) * a)
    # Choice: is_clipped is about 1 - low and 1 + high only, as TRL's clip ratio is; a token that
    # delta caps (A < 0, ratio > delta) has no gradient either but is not counted.
    is_clipped = beyond(ratio.real, 1.0 - low, 1.0 + high, a)
    return results(aggregate(with_kl(loss, kl, beta), mask), ratio, is_clipped, kl, mask)


def grpo(policy, old=None, *, mask, advantages, ref_token_logp=None, **settings):
    """2402.03300: mean over the tokens of a sequence, then over sequences."""
    return clipped_surrogate(
        policy, old, mask, advantages, ref_token_logp, mean_in_sequence, **settings
    )


def bnpo(policy, old=None, *, mask, advantages, ref_token_logp=None, **settings):
    """TRL's `bnpo`: mean over the tokens of the local batch."""
    return clipped_surrogate(
        policy, old, mask, advantages, ref_token_logp, mean_in_batch, **settings
    )


def dr_grpo(
    policy, old=None, *, mask, advantages, ref_token_logp=None, max_completion_length, **settings
):
    """2503.20783: sum over tokens / max_completion_length."""

    def aggregate(token_loss, mask):
        return np.sum(np.where(mask, token_loss, 0.0), axis=1) / max_completion_length

    return clipped_surrogate(policy, old, mask, advantages, ref_token_logp, aggregate, **settings)


def dapo(policy, old=None, *, mask, advantages, ref_token_logp=None, epsilon_high=0.28, **settings):
    """2503.14476: mean over the tokens of the whole batch; a wider upper bound."""
    return clipped_surrogate(
        policy,
        old,
        mask,
        advantages,
        ref_token_logp,
        mean_in_batch,
        epsilon_high=epsilon_high,
        **settings,
    )


def gspo(
    policy,
    old=None,
    *,
    mask,
    advantages,
    ref_token_logp=None,
    beta=0.0,
    epsilon_low=0.0003,
    epsilon_high=0.0004,
    use_bias_correction_kl=False,
):
    """2507.18071: the clipped surrogate of exp(mean log ratio), one per sequence."""
    a, kl = per_token(advantages), k3(policy, ref_token_logp, mask)
    # Choice: advantages by token share the sequence's ratio, and the mean over tokens is taken (not
    # GSPO-token). ratio and is_clipped repeat the sequence's over its tokens.
    ratio = ratios(policy, old, mask, "sequence")
    kl = corrected(kl, ratio, use_bias_correction_kl)
    low, high = 1.0 - epsilon_low, 1.0 + epsilon_high
    loss = -minimum(ratio * a, clip(ratio, low, high) * a)
    losses = mean_in_sequence(with_kl(loss, kl, beta), mask)
    return results(losses, ratio, beyond(ratio.real, low, high, a), kl, mask)


def cispo(
    policy,
    old=None,
    *,
    mask,
    advantages,
    ref_token_logp=None,
    beta=0.0,
    epsilon_high=5.0,
    use_bias_correction_kl=False,
):
    """2506.13585: -sg[min(ratio, epsilon_high)] A log p, mean over the tokens of the batch."""
    a, kl = per_token(advantages), k3(policy, ref_token_logp, mask)
    kl = corrected(kl, ratios(policy, old, mask), use_bias_correction_kl)
    ratio = frozen(ratios(policy, old, mask))
    loss = -np.minimum(ratio, epsilon_high) * a * np.where(mask, policy, 0.0)
    losses = mean_in_batch(with_kl(loss, kl, beta), mask)
    # Choice: only where A > 0, as TRL counts, though the cap holds for either sign.
    return results(losses, ratio, (ratio > epsilon_high) & (a > 0), kl, mask)


def sapo(
    policy,
    old=None,
    *,
    mask,
    advantages,
    ref_token_logp=None,
    beta=0.0,
    tau_positive=1.0,
    tau_negative=1.05,
    use_bias_correction_kl=False,
):
    """2511.20347: -A (4 / tau) S(tau (ratio - 1)), tau by the sign of A."""
    a, kl = per_token(advantages), k3(policy, ref_token_logp, mask)
    ratio = ratios(policy, old, mask)
    kl = corrected(kl, ratio, use_bias_correction_kl)
    tau = np.where(a > 0, tau_positive, tau_negative)
    loss = -a * (4.0 / tau) * sigmoid(tau * (ratio - 1.0))
    # Choice: a soft gate clips nothing.
    losses = mean_in_sequence(with_kl(loss, kl, beta), mask)
    return results(losses, ratio, np.zeros(mask.shape, dtype=bool), kl, mask)


def luspo(
    policy,
    old=None,
    *,
    mask,
    advantages,
    ref_token_logp=None,
    epsilon_low=0.0003,
    epsilon_high=0.0004,
    importance_sampling_level="sequence",
    **settings,
):
    """2602.05261: GSPO's loss of a sequence times its length."""

    def aggregate(token_loss, mask):
        return mask.sum(axis=1) * mean_in_sequence(token_loss, mask)

    settings |= {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    settings |= {"importance_sampling_level": importance_sampling_level}
    return clipped_surrogate(policy, old, mask, advantages, ref_token_logp, aggregate, **settings)


def vespo(
    policy,
    old=None,
    *,
    mask,
    advantages,
    ref_token_logp=None,
    sampler_ratio=None,
    beta=0.0,
    k_positive=2.0,
    lambda_positive=3.0,
    k_negative=3.0,
    lambda_negative=2.0,
    use_bias_correction_kl=False,
):
    """2602.10693: -sg[phi(w)] A log p, phi(w) = e^lambda w^k e^(-lambda w), w = prod ratio."""
    a, kl = per_token(advantages), k3(policy, ref_token_logp, mask)
    ratio = ratios(policy, old, mask)
    kl = corrected(kl, ratio, use_bias_correction_kl)
    w = np.prod(frozen(np.where(mask, ratio, 1.0)), axis=1)
    if sampler_ratio is not None:
        # Choice: a factor of a response, or of each scored token.
        per_response = sampler_ratio.ndim == 1
        w = w * (
            sampler_ratio if per_response else np.prod(np.where(mask, sampler_ratio, 1.0), axis=1)
        )
    k = np.where(a >= 0, k_positive, k_negative)
    rate = np.where(a >= 0, lambda_positive, lambda_negative)
    phi = np.exp(rate) * w[:, None] ** k * np.exp(-rate * w[:, None])
    loss = -phi * a * np.where(mask, policy, 0.0)
    losses = mean_in_batch(with_kl(loss, kl, beta), mask)
    return results(losses, ratio, np.zeros(mask.shape, dtype=bool), kl, mask)


def gmpo(
    policy,
    old=None,
    *,
    mask,
    advantages,
    ref_token_logp=None,
    beta=0.0,
    epsilon_low=0.4,
    epsilon_high=0.4,
):
    """2507.20673: -A exp(mean over tokens of the clipped log ratio)."""
    a, kl = per_token(advantages), k3(policy, ref_token_logp, mask)
    # Choice: one-sided, by the sign of A: for A > 0 at most epsilon_high, otherwise at least
    # -epsilon_low (TRL's reading; algorithm 1 of the paper has one epsilon). With advantages by
    # token, each clips by its own, all share the geometric mean, and the mean over tokens is taken.
    # ratio is the token's, not clipped. An empty sequence has loss 0.
    log_ratio = log_ratios(policy, old, mask)
    clipped = np.where(a > 0, minimum(log_ratio, epsilon_high), maximum(log_ratio, -epsilon_low))
    geometric_mean = np.exp(mean_in_sequence(clipped, mask))[:, None]
    losses = mean_in_sequence(with_kl(-a * geometric_mean, kl, beta), mask)
    is_clipped = beyond(log_ratio.real, -epsilon_low, epsilon_high, a)
    return results(losses, np.exp(log_ratio), is_clipped, kl, mask)


def disco(
    policy,
    old=None,
    *,
    mask,
    rewards,
    group_ids,
    score="log_likelihood",
    tau=None,
    delta=0.0001,
    kl_weight=1000.0,
    kl_estimator="low_var",
):
    """2505.12366: -J + (kl_weight / 2) relu(KL - delta)^2,

    J = mean over questions of mean_{+} s - tau log mean_{-} e^(s / tau).
    """
    log_ratio = log_ratios(policy, old, mask)
    ratio = np.exp(log_ratio)
    if score == "log_likelihood":
        tau, s = 10.0 if tau is None else tau, mean_in_sequence(policy, mask)
    else:
        tau, s = 1.0 if tau is None else tau, mean_in_sequence(ratio, mask)
    total, questions = 0.0, np.unique(group_ids)
    for question in questions:
        positive = s[(group_ids == question) & (rewards > 0.5)]
        negative = s[(group_ids == question) & (rewards <= 0.5)]
        # Choice: a group without a positive or without a negative adds nothing to J but counts in
        # the number of questions (the authors' code).
        if len(positive) and len(negative):
            if np.isinf(tau):
                against = np.mean(negative)
            else:
                against = tau * (logsumexp(negative / tau) - np.log(len(negative)))
            total = total + np.mean(positive) - against
    # Estimates of KL(old, policy), mean over the tokens of the batch.
    # Choice: the other estimator is named "kl". kl of the result is this estimate at every token;
    # nothing is clipped. All groups and all tokens enter the KL.
    kl = ratio - 1.0 - log_ratio if kl_estimator == "low_var" else -log_ratio
    kl_mean = np.sum(np.where(mask, kl, 0.0)) / max(mask.sum(), 1)
    loss = -total / len(questions) + 0.5 * kl_weight * relu(kl_mean - delta) ** 2
    # Repeated, so that the mean over sequences is the loss of the batch.
    losses = np.full(len(mask), loss)
    return results(losses, ratio, np.zeros(mask.shape, dtype=bool), kl, mask)


def group_advantages(rewards, group_ids, normalize="std"):
    """2402.03300: (R - mean) / (std + 1e-4) in each group; "none" (2503.20783) without the std."""
    # Choice: std with n - 1, as torch.std and TRL; a group of one, or of equal rewards, has 0.
    advantages = np.zeros(len(rewards))
    for group in np.unique(group_ids):
        rows = group_ids == group
        centred = rewards[rows] - rewards[rows].mean()
        std = rewards[rows].std(ddof=1) if normalize == "std" and rows.sum() > 1 else None
        advantages[rows] = centred if std is None else centred / (std + 1e-4)
    return advantages


FORMULAS = {
    "grpo": grpo,
    "bnpo": bnpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "luspo": luspo,
    "vespo": vespo,
    "gmpo": gmpo,
    "disco": disco,
}

_B, _T = 12, 9
_draw = np.random.default_rng(22)
_scored = _draw.integers(1, _T + 1, _B)
_mask = np.arange(_T) < _scored[:, None]
_holes = _mask & (_draw.uniform(size=(_B, _T)) < 0.8)  # A tool's output in the middle.
_holes[3] = False  # An empty sequence.
_advantages = _draw.normal(size=_B)
_advantages_by_token = _draw.normal(size=(_B, _T))
_ref = -_draw.uniform(0.1, 3.0, (_B, _T))
_group_ids = np.repeat([7, 2, 5], 4)
# The last group has no negative.
_rewards = np.array([1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1], dtype=np.float64)
_shuffle = _draw.permutation(_B)

_plain = {"mask": _mask, "advantages": _advantages}
_by_token = {"mask": _holes, "advantages": _advantages_by_token}
_penalised = {"mask": _holes, "advantages": _advantages, "ref_token_logp": _ref, "beta": 0.04}
_corrected = {**_penalised, "use_bias_correction_kl": True}
_groups = {"mask": _mask, "rewards": _rewards, "group_ids": _group_ids}
_shuffled = {
    "mask": _holes,
    "rewards": _rewards[_shuffle],
    "group_ids": _group_ids[_shuffle],
}

EXAMPLES = {
    "grpo": [
        _plain,
        _penalised,
        {**_by_token, "epsilon_high": 0.4, "delta": 1.6},
        {**_corrected, "importance_sampling_level": "sequence", "epsilon_low": 0.02},
        _corrected,
    ],
    "bnpo": [_plain, _corrected, _penalised, {**_by_token, "epsilon_low": 0.3, "delta": 1.6}],
    "dr_grpo": [
        {**_plain, "max_completion_length": 16},
        {**_penalised, "max_completion_length": 9},
        {**_corrected, "max_completion_length": 9, "importance_sampling_level": "sequence"},
        {**_by_token, "max_completion_length": 9, "delta": 1.6},
    ],
    "dapo": [
        _plain,
        {**_corrected, "importance_sampling_level": "sequence"},
        _penalised,
        {**_by_token, "delta": 1.6},
    ],
    "gspo": [
        _plain,
        {**_penalised, "epsilon_low": 0.1, "epsilon_high": 0.2},
        _by_token,
        _corrected,
    ],
    "cispo": [
        _plain,
        {**_penalised, "epsilon_high": 1.2},
        {**_by_token, "epsilon_high": 1.5},
        _corrected,
    ],
    "sapo": [
        _plain,
        _penalised,
        {**_by_token, "tau_positive": 2.0, "tau_negative": 3.0},
        _corrected,
    ],
    "luspo": [
        _plain,
        {**_penalised, "epsilon_low": 0.1, "epsilon_high": 0.2},
        {**_corrected, "importance_sampling_level": "token", "delta": 1.1},
    ],
    "vespo": [
        _plain,
        {**_corrected, "sampler_ratio": _draw.uniform(0.5, 1.5, _B)},
        {**_by_token, "sampler_ratio": _draw.uniform(0.8, 1.2, (_B, _T))},
        {**_plain, "k_positive": 1.5, "k_negative": 1.0, "lambda_positive": 0.5},
    ],
    "gmpo": [_plain, {**_penalised, "epsilon_low": 0.2, "epsilon_high": 0.3}],
    "disco": [
        _groups,
        {**_shuffled, "score": "likelihood_ratio", "kl_weight": 10.0},
        {**_groups, "tau": np.inf, "kl_estimator": "kl", "delta": 0.001, "kl_weight": 20.0},
        {**_shuffled, "score": "likelihood_ratio", "tau": 0.5, "delta": 5.0},
    ],
}
