# SPDX-License-Identifier: Apache-2.0
"""The pairwise objectives without a reference, of (policy_chosen, policy_rejected), as pair.py."""

from collections.abc import Callable

import numpy as np

from .numeric import frozen, log1mexp, log_sigmoid, mean_per_token, relu, softplus
from .pair import chosen_sft, rewarded, smoothed

FORMULAS: dict[str, Callable] = {}


def formula(function: Callable) -> Callable:
    FORMULAS[function.__name__] = function
    return function


@formula
def simpo(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths,
    rejected_lengths,
    beta=2.5,
    gamma=1.0,
    label_smoothing=0.0,
):
    # 2405.14734.
    s_w = mean_per_token(policy_chosen, chosen_lengths)
    s_l = mean_per_token(policy_rejected, rejected_lengths)
    losses = smoothed(beta * (s_w - s_l) - gamma, label_smoothing)
    return rewarded(losses, beta * s_w, beta * s_l)


@formula
def alpha_po(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths,
    rejected_lengths,
    alpha=0.25,
    beta=2.5,
    gamma=0.1,
):
    # 2501.03884: r = beta (1 - p^-alpha) / alpha with p the mean probability of a token.
    def reward(total, lengths):
        s = mean_per_token(total, lengths)
        return beta * s if alpha == 0 else -beta * np.expm1(-alpha * s) / alpha

    # Choice: the rewards are r itself, the score compared (TRL too).
    r_w, r_l = reward(policy_chosen, chosen_lengths), reward(policy_rejected, rejected_lengths)
    return rewarded(softplus(-(r_w - r_l - gamma)), r_w, r_l)


@formula
def cpo(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths=None,
    chosen_nll=None,
    beta=0.1,
    label_smoothing=0.0,
    sft_weight=1.0,
):
    # 2401.08417.
    losses = smoothed(beta * (policy_chosen - policy_rejected), label_smoothing)
    losses = losses + chosen_sft(sft_weight, policy_chosen, chosen_nll, chosen_lengths)
    return rewarded(losses, beta * policy_chosen, beta * policy_rejected)


@formula
def orpo(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths,
    rejected_lengths,
    chosen_nll=None,
    beta=0.1,
    sft_weight=1.0,
):
    # 2403.07691: odds p / (1 - p), p the mean probability of a token.
    s_w = mean_per_token(policy_chosen, chosen_lengths)
    s_l = mean_per_token(policy_rejected, rejected_lengths)
    log_odds_ratio = (s_w - log1mexp(s_w)) - (s_l - log1mexp(s_l))
    losses = chosen_sft(sft_weight, policy_chosen, chosen_nll, chosen_lengths)
    losses = losses + beta * softplus(-log_odds_ratio)
    # Choice: the rewards are beta times the mean log-probability (ORPO in TRL), not the log-odds.
    return rewarded(losses, beta * s_w, beta * s_l)


@formula
def asft(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths,
    rejected_lengths,
    chosen_nll=None,
    beta=0.1,
    sft_weight=1.0,
):
    # Aligned supervised fine-tuning, 2409.10571: -log S(logit p_w) - log S(-logit p_l).
    s_w = mean_per_token(policy_chosen, chosen_lengths)
    s_l = mean_per_token(policy_rejected, rejected_lengths)
    logit_w, logit_l = s_w - log1mexp(s_w), s_l - log1mexp(s_l)
    losses = chosen_sft(sft_weight, policy_chosen, chosen_nll, chosen_lengths)
    losses = losses - beta * (log_sigmoid(logit_w) + log_sigmoid(-logit_l))
    # Choice: the rewards are as in orpo, of which this is the separable form.
    return rewarded(losses, beta * s_w, beta * s_l)


@formula
def simper(policy_chosen, policy_rejected, *, chosen_lengths, rejected_lengths):
    # 2502.00883: inverse perplexities.
    s_w = mean_per_token(policy_chosen, chosen_lengths)
    s_l = mean_per_token(policy_rejected, rejected_lengths)
    # Choice: the rewards are the mean log-probabilities (official code); there is no beta.
    return rewarded(-np.exp(s_w) + np.exp(s_l), s_w, s_l)


@formula
def slic(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths=None,
    chosen_nll=None,
    delta=1.0,
    sft_weight=0.1,
):
    # 2305.10425.
    losses = relu(delta - policy_chosen + policy_rejected)
    losses = losses + chosen_sft(sft_weight, policy_chosen, chosen_nll, chosen_lengths)
    # Choice: there is no beta, so the rewards are the summed log-probabilities it compares.
    return rewarded(losses, policy_chosen, policy_rejected)


@formula
def amapo(
    policy_chosen,
    policy_rejected,
    *,
    chosen_lengths,
    rejected_lengths,
    beta=2.5,
    label_smoothing=0.0,
):
    # 2511.09385: pairs below the batch's mean gap get a margin.
    s_w = mean_per_token(policy_chosen, chosen_lengths)
    s_l = mean_per_token(policy_rejected, rejected_lengths)
    gap = frozen(s_w - s_l)
    # Choice: the sample standard deviation (divisor P - 1) without an eps: the official code calls
    # torch.std. Where it is 0 no gap lies below the mean, and the margin is 0.
    mean, below = np.mean(gap), gap < np.mean(gap)
    deviation = np.std(gap, ddof=1) if np.any(below) else 1.0
    margin = beta * np.where(below, np.exp((mean - gap) / deviation * mean), 0.0)
    losses = smoothed(beta * (s_w - s_l) - margin, label_smoothing)
    return rewarded(losses, beta * s_w, beta * s_l)


@formula
def sft(policy_chosen, policy_rejected, *, chosen_lengths=None, chosen_nll=None):
    # Choice: there is no beta and nothing compared; the rewards are the summed log-probabilities.
    losses = chosen_sft(1.0, policy_chosen, chosen_nll, chosen_lengths)
    return rewarded(losses, policy_chosen, policy_rejected)
