# SPDX-License-Identifier: Apache-2.0
"""The pairwise objectives with a reference, written in numpy from their papers.

Every formula takes the arrays (policy_chosen, policy_rejected, ref_chosen, ref_rejected) and
returns (losses, chosen_rewards, rejected_rewards). Letters: w and l are chosen and rejected,
x = policy - reference, m = beta (x_w - x_l), s a sum of log-probabilities, n its number of tokens,
`_bar` a mean per token. Where a paper and its code leave something open, a comment `# Choice:` says
what is taken and why.
"""

from collections.abc import Callable

import numpy as np

from .numeric import (
    absolute,
    arctan,
    clip,
    frozen,
    log_sigmoid,
    logsumexp,
    mean_per_token,
    relu,
    sigmoid,
    softmax,
    softplus,
    sort,
)

FORMULAS: dict[str, Callable] = {}


def formula(function: Callable) -> Callable:
    FORMULAS[function.__name__] = function
    return function


def log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    return policy_chosen - ref_chosen, policy_rejected - ref_rejected


def rewarded(losses, reward_w, reward_l):
    return losses, frozen(reward_w), frozen(reward_l)


def smoothed(m, label_smoothing):
    """cDPO, 2403.00409: (1 - eps) sp(-m) + eps sp(m)."""
    return softplus(-m) + label_smoothing * m


def chosen_sft(sft_weight, policy_chosen, chosen_nll, chosen_lengths):
    """sft_weight nll, where nll is by default the mean over the chosen tokens."""
    # Choice: without either extra the term exists only at weight 0, since the default of
    # chosen_nll needs the lengths (flex_dpo has none).
    if chosen_nll is None and chosen_lengths is None:
        if sft_weight != 0:
            raise ValueError("chosen_nll or chosen_lengths is needed")
        return 0.0
    nll = mean_per_token(-policy_chosen, chosen_lengths) if chosen_nll is None else chosen_nll
    return sft_weight * nll


@formula
def dpo(*logps, beta=0.1, label_smoothing=0.0):
    # 2305.18290; smoothing as in 2403.00409.
    x_w, x_l = log_ratios(*logps)
    return rewarded(smoothed(beta * (x_w - x_l), label_smoothing), beta * x_w, beta * x_l)


@formula
def robust_dpo(*logps, beta=0.1, label_smoothing=0.1):
    # rDPO, 2403.00409: ((1 - eps) l(m) - eps l(-m)) / (1 - 2 eps).
    x_w, x_l = log_ratios(*logps)
    m, eps = beta * (x_w - x_l), label_smoothing
    losses = ((1 - eps) * softplus(-m) - eps * softplus(m)) / (1 - 2 * eps)
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def ipo(*logps, chosen_lengths=None, rejected_lengths=None, beta=0.1, normalize="mean"):
    # 2310.12036; the mean over tokens as in TRL.
    x_w, x_l = log_ratios(*logps)
    gap = x_w - x_l
    if normalize == "mean":
        gap = mean_per_token(x_w, chosen_lengths) - mean_per_token(x_l, rejected_lengths)
    return rewarded((gap - 1 / (2 * beta)) ** 2, beta * x_w, beta * x_l)


@formula
def hinge(*logps, beta=0.1):
    # 2309.06657 (RSO).
    x_w, x_l = log_ratios(*logps)
    return rewarded(relu(1 - beta * (x_w - x_l)), beta * x_w, beta * x_l)


@formula
def exo_pair(*logps, beta=0.1, label_smoothing=0.001):
    # 2402.00856: the reverse KL from (S(m), S(-m)) to (1 - eps, eps).
    x_w, x_l = log_ratios(*logps)
    m, eps = beta * (x_w - x_l), label_smoothing
    losses = sigmoid(m) * (log_sigmoid(m) - np.log(1 - eps))
    losses = losses + sigmoid(-m) * (log_sigmoid(-m) - np.log(eps))
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def nca_pair(*logps, beta=0.01):
    # 2402.05369.
    x_w, x_l = log_ratios(*logps)
    r_w, r_l = beta * x_w, beta * x_l
    losses = -log_sigmoid(r_w) - log_sigmoid(-r_w) / 2 - log_sigmoid(-r_l) / 2
    return rewarded(losses, r_w, r_l)


@formula
def bco_pair(*logps, delta=None, beta=0.1):
    # 2404.04656.
    x_w, x_l = log_ratios(*logps)
    delta = 0.0 if delta is None else delta
    losses = -log_sigmoid(beta * x_w - delta) - log_sigmoid(-(beta * x_l - delta))
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def sppo(*logps, chosen_win_probs, rejected_win_probs, beta=0.001):
    # 2405.00675.
    x_w, x_l = log_ratios(*logps)
    losses = (x_w - (chosen_win_probs - 0.5) / beta) ** 2 / 2
    losses = losses + (x_l - (rejected_win_probs - 0.5) / beta) ** 2 / 2
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def sppo_hard(*logps, beta=0.001):
    # 2405.00675 with probabilities 1 and 0, without the half (TRL).
    x_w, x_l = log_ratios(*logps)
    losses = (x_w - 0.5 / beta) ** 2 + (x_l + 0.5 / beta) ** 2
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def aot(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta=0.01, label_smoothing=0.0
):
    # 2406.05882, paired: quantiles of the policy's gaps against those of the reference's.
    x_w, x_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    gap = sort(policy_chosen - policy_rejected) - sort(ref_chosen - ref_rejected)
    # Choice: the rewards are in input order, the losses in ascending order of the quantile.
    return rewarded(smoothed(beta * gap, label_smoothing), beta * x_w, beta * x_l)


@formula
def aot_unpaired(*logps, beta=0.01, label_smoothing=0.0):
    # 2406.05882, unpaired: quantiles of x_w against those of x_l.
    x_w, x_l = log_ratios(*logps)
    gap = sort(x_w) - sort(x_l)
    return rewarded(smoothed(beta * gap, label_smoothing), beta * x_w, beta * x_l)


@formula
def apo_zero(*logps, beta=0.1):
    # 2408.06266.
    x_w, x_l = log_ratios(*logps)
    return rewarded(1 - sigmoid(beta * x_w) + sigmoid(beta * x_l), beta * x_w, beta * x_l)


@formula
def apo_down(*logps, beta=0.1):
    # 2408.06266.
    x_w, x_l = log_ratios(*logps)
    losses = sigmoid(beta * x_w) + 1 - sigmoid(beta * (x_w - x_l))
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def discopop(*logps, beta=0.05, tau=0.05):
    # 2406.08414, equation 5: logistic and exponential loss, mixed by S(m / tau).
    x_w, x_l = log_ratios(*logps)
    m = beta * (x_w - x_l)
    losses = sigmoid(-m / tau) * softplus(-m) + np.exp(log_sigmoid(m / tau) - m)
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def sigmoid_norm(*logps, chosen_lengths, rejected_lengths, beta=5.0):
    # Tulu 3, 2411.15124: DPO on means over tokens.
    x_w, x_l = log_ratios(*logps)
    gap = mean_per_token(x_w, chosen_lengths) - mean_per_token(x_l, rejected_lengths)
    # Choice: the rewards are beta times the summed log-ratio, the catalogue's rule and TRL's code.
    return rewarded(softplus(-beta * gap), beta * x_w, beta * x_l)


@formula
def f_dpo(*logps, beta=0.1, divergence="reverse_kl", alpha=None):
    # 2309.16240: phi(x) = f'(e^x), up to a constant.
    def phi(x):
        if divergence == "reverse_kl":
            return x
        if divergence == "forward_kl":
            return -np.exp(-x)
        if divergence == "js":
            return np.log(2.0) - softplus(-x)
        return -np.exp(-alpha * x) / alpha

    x_w, x_l = log_ratios(*logps)
    # Choice: the rewards are beta x for every divergence, as the catalogue says and TRL does.
    return rewarded(softplus(-beta * (phi(x_w) - phi(x_l))), beta * x_w, beta * x_l)


@formula
def chi_po(*logps, beta=0.1, max_reward=None):
    # 2407.13399.
    x_w, x_l = log_ratios(*logps)
    m = beta * ((np.exp(x_w) + x_w) - (np.exp(x_l) + x_l))
    if max_reward is not None:
        m = clip(m, -2 * max_reward, 2 * max_reward)
    return rewarded(softplus(-m), beta * x_w, beta * x_l)


@formula
def madpo(*logps, reward_margin, beta=0.1, c_min=0.5, c_max=2.0, slope=1.0, tau=2.0):
    # 2510.05342: hard pairs amplified, easy ones damped.
    x_w, x_l = log_ratios(*logps)
    h = reward_margin
    if c_min == 1:  # The formula divides by 1 - c_min; its limit is 1.
        c = np.ones_like(h)
    else:
        steepness = (c_max - 1) / (1 - c_min)
        c = c_min + (c_max - c_min) / (1 + steepness * np.exp(slope * (absolute(h) - tau)))
    weight = np.where(h > -tau, sigmoid(c * h) / sigmoid(h), 1.0)
    return rewarded(weight * softplus(-beta * (x_w - x_l)), beta * x_w, beta * x_l)


@formula
def da_dpo(*logps, reward_margin, beta=0.1, alpha=1.0):
    # 2601.00623.
    x_w, x_l = log_ratios(*logps)
    m = beta * (1 + absolute(reward_margin)) * alpha * (x_w - x_l)
    return rewarded(softplus(-m), beta * x_w, beta * x_l)


@formula
def flex_dpo(*logps, chosen_nll=None, beta_chosen=0.1, beta_rejected=0.08, sft_weight=0.0):
    # 3D-Properties, 2406.07327.
    x_w, x_l = log_ratios(*logps)
    # Choice: each reward has its own beta, since they are what the loss compares.
    r_w, r_l = beta_chosen * x_w, beta_rejected * x_l
    losses = softplus(-(r_w - r_l)) + chosen_sft(sft_weight, logps[0], chosen_nll, None)
    return rewarded(losses, r_w, r_l)


@formula
def soft_label_dpo(*logps, preference_probs, beta=0.1):
    # DNO, 2404.03715, algorithm 1.
    x_w, x_l = log_ratios(*logps)
    m, q = beta * (x_w - x_l), preference_probs
    return rewarded(-q * log_sigmoid(m) - (1 - q) * log_sigmoid(-m), beta * x_w, beta * x_l)


@formula
def odpo(*logps, reward_margin, beta=0.1, alpha=1.0):
    # 2402.10571.
    x_w, x_l = log_ratios(*logps)
    losses = softplus(-(beta * (x_w - x_l) - alpha * np.log(reward_margin)))
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def rpo_reward(*logps, reward_margin, beta=0.1, eta=1.0, distance="backward_kl"):
    # Reward-aware preference optimization, 2406.11704.
    def kl(target, estimate):  # KL(Bernoulli S(target), Bernoulli S(estimate))
        kept = sigmoid(target) * (log_sigmoid(target) - log_sigmoid(estimate))
        return kept + sigmoid(-target) * (log_sigmoid(-target) - log_sigmoid(-estimate))

    x_w, x_l = log_ratios(*logps)
    m, d = beta * (x_w - x_l), eta * reward_margin
    # Choice: the whole divergence with the entropy of the target, so 0 at m = d (NeMo-Aligner).
    losses = {"backward_kl": kl(d, m), "forward_kl": kl(m, d), "square": (m - d) ** 2}[distance]
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def r_dpo(*logps, chosen_lengths, rejected_lengths, beta=0.1, alpha=0.01):
    # 2403.19159, with the sign that follows from a reward r - alpha |y|.
    x_w, x_l = log_ratios(*logps)
    m = beta * (x_w - x_l) + alpha * (chosen_lengths - rejected_lengths)
    return rewarded(softplus(-m), beta * x_w, beta * x_l)


@formula
def dpop(*logps, beta=0.1, penalty=50.0):
    # DPO-Positive, 2402.13228.
    x_w, x_l = log_ratios(*logps)
    losses = softplus(-beta * (x_w - x_l - penalty * relu(-x_w)))
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def cal_dpo(*logps, beta=0.001, calibration_weight=1.0):
    # 2412.14516: no beta in the logistic term.
    x_w, x_l = log_ratios(*logps)
    calibration = (x_w - 1 / (2 * beta)) ** 2 + (x_l + 1 / (2 * beta)) ** 2
    losses = softplus(-(x_w - x_l)) + calibration_weight * calibration
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def dr_dpo(*logps, beta=0.1, tau=1.0):
    # 2407.07880.
    losses, *rewards = dpo(*logps, beta=beta)
    value = -tau * (logsumexp(-losses / tau) - np.log(losses.size))
    return np.full_like(losses, value), *rewards


@formula
def beta_dpo(*logps, running_mean, keep=None, beta=0.1, alpha=0.6, beta_min=0.001):
    # 2407.08639: one beta for the batch, from the mean gap of the kept pairs.
    x_w, x_l = log_ratios(*logps)
    gap = x_w - x_l
    keep = np.ones(gap.shape, dtype=bool) if keep is None else keep
    batch_beta = beta * (1 + alpha * (np.mean(frozen(gap)[keep]) - running_mean))
    batch_beta = np.maximum(batch_beta, beta_min)
    # Choice: the code divides the sum over kept pairs by their number, so a kept loss counts
    # P / kept and a dropped one 0: the plain mean is then the published loss.
    losses = softplus(-batch_beta * gap) * keep * (keep.size / np.sum(keep))
    # Choice: the rewards have the given beta, not the batch's (as in the official code).
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def alpha_dpo(
    *logps,
    running_mean,
    running_std,
    chosen_lengths,
    rejected_lengths,
    beta=2.5,
    gamma=1.0,
    alpha=0.1,
):
    # 2410.10148: SimPO, its margin moved by the normalised gap of log-ratios.
    s_w, s_l = mean_per_token(logps[0], chosen_lengths), mean_per_token(logps[1], rejected_lengths)
    x_w, x_l = log_ratios(*logps)
    # Choice: the gap in z is per token: the official trainer (`ln: true`) averages the
    # log-probabilities of policy and reference alike before it takes any difference.
    x_bar_w, x_bar_l = mean_per_token(x_w, chosen_lengths), mean_per_token(x_l, rejected_lengths)
    z = (x_bar_w - x_bar_l - running_mean) / running_std
    losses = softplus(-beta * (s_w - s_l - frozen(gamma / beta + alpha * z)))
    # Choice: the rewards are beta x (the code logs beta (s_bar - alpha x_bar)).
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def epsilon_dpo(*logps, margin_plus, margin_minus, beta=0.01, epsilon=0.01):
    # 2502.13177: a pair's beta steps to where the margin of logps grows.
    x_w, x_l = log_ratios(*logps)
    margin = frozen(logps[0] - logps[1])
    up = (margin_plus > margin) & (margin > margin_minus)
    down = (margin_minus > margin) & (margin > margin_plus)
    pair_beta = beta / (1 + epsilon * (up.astype(float) - down))
    # Choice: the rewards have the given beta, by the catalogue's rule (the code takes the pair's).
    return rewarded(softplus(-pair_beta * (x_w - x_l)), beta * x_w, beta * x_l)


@formula
def relative_po(*logps, prompt_embeddings, beta=0.1, tau=0.5):
    # 2402.10958: every chosen response i against every rejected response j, itself included.
    x_w, x_l = log_ratios(*logps)
    directions = prompt_embeddings / np.linalg.norm(prompt_embeddings, axis=-1, keepdims=True)
    weights = softmax(directions @ directions.T / tau, axis=-1)
    # Choice: the weights stand outside the logistic loss, as the catalogue has it (the
    # official code has them inside, and the plain mean over j).
    losses = np.sum(weights * softplus(-beta * (x_w[:, None] - x_l[None, :])), axis=-1)
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def gpo(*logps, beta=0.1, function="logistic"):
    # 2402.05749, table 1.
    x_w, x_l = log_ratios(*logps)
    m = beta * (x_w - x_l)
    losses = {
        "logistic": lambda: softplus(-m),
        "hinge": lambda: relu(1 - m),
        "square": lambda: (m - 1) ** 2,
        "exponential": lambda: np.exp(-m),
        "truncated_square": lambda: relu(1 - m) ** 2,
        "savage": lambda: sigmoid(-m) ** 2,
    }[function]()
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def focal_po(*logps, beta=0.1, gamma=0.05):
    # 2501.06645: down-weights the pairs that are ranked wrongly.
    x_w, x_l = log_ratios(*logps)
    m = beta * (x_w - x_l)
    return rewarded(np.exp(gamma * log_sigmoid(m)) * softplus(-m), beta * x_w, beta * x_l)


@formula
def mallows_po(*logps, ref_entropy, beta=0.1, phi=0.29, loss="dpo"):
    # 2405.14953: the dispersion of the prompt, from the entropy of the reference.
    x_w, x_l = log_ratios(*logps)
    gap = -phi * np.log(ref_entropy) * (x_w - x_l)
    # Choice: "ipo" is (gap - 1 / (2 beta))^2, on the scale of `ipo` and as the official code has
    # it; (beta gap - 1/2)^2 = beta^2 times that is RainbowPO's copy.
    losses = softplus(-beta * gap) if loss == "dpo" else (gap - 1 / (2 * beta)) ** 2
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def rainbow_po(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    *,
    chosen_lengths,
    rejected_lengths,
    ref_entropy=None,
    beta=10.0,
    alpha=0.25,
    gamma=0.1,
    phi=0.29,
    function="logistic",
):
    # 2410.04203.
    def gap(chosen, rejected):
        return mean_per_token(chosen, chosen_lengths) - mean_per_token(rejected, rejected_lengths)

    policy_gap, ref_gap = gap(policy_chosen, policy_rejected), gap(ref_chosen, ref_rejected)
    u = beta * (policy_gap - alpha * ref_gap - (1 - alpha) * gamma)
    # Choice: the Mallows factor multiplies the home advantage gamma too (official code); None is 1.
    if ref_entropy is not None:
        u = -phi * np.log(ref_entropy) * u
    losses = softplus(-u) if function == "logistic" else -np.log(arctan(u) / np.pi + 0.5)
    x_w, x_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    # Choice: the rewards are beta times the summed log-ratio, by the catalogue's rule.
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def dpo_shift(*logps, shift, beta=0.1):
    # 2502.07599.
    x_w, x_l = log_ratios(*logps)
    # Choice: the rewards are beta x, unshifted, by the catalogue's rule.
    return rewarded(softplus(-beta * (x_w - shift * x_l)), beta * x_w, beta * x_l)


@formula
def mcts_dpo(*logps, chosen_q_values, rejected_q_values, beta=0.1, loss="sigmoid"):
    # 2405.00451.
    x_w, x_l = log_ratios(*logps)
    eps = 1 - 1 / (1 + rejected_q_values / np.maximum(1.0, chosen_q_values))
    # Choice: "ipo" takes the summed log-ratios and no smoothing, so the q values drop out.
    if loss == "ipo":
        losses = (x_w - x_l - 1 / (2 * beta)) ** 2
    else:
        losses = smoothed(beta * (x_w - x_l), np.minimum(eps, 0.5))
    return rewarded(losses, beta * x_w, beta * x_l)


@formula
def tdpo(*logps, chosen_kl, rejected_kl, beta=0.1, alpha=0.5, version=2):
    # 2404.11999; the summed KL(ref, policy) are differentiable.
    x_w, x_l = log_ratios(*logps)
    if version == 1:
        drift = rejected_kl - chosen_kl
    else:
        drift = alpha * (rejected_kl - frozen(chosen_kl))
    # Choice: the rewards are beta x, without the KL, by the catalogue's rule.
    return rewarded(softplus(-beta * (x_w - x_l - drift)), beta * x_w, beta * x_l)


@formula
def ofs_dpo(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    *,
    other_chosen_logps,
    other_rejected_logps,
    beta=0.1,
    alpha=0.1,
    role="fast",
):
    # 2406.05534, equations 3 to 6: the other module is detached.
    x_w, x_l = log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    own_gap = policy_chosen - policy_rejected
    other_gap = frozen(other_chosen_logps) - frozen(other_rejected_logps)
    # Choice: the policy is the module that is trained, so the fast one's rival is slow and back.
    sign, lead = (1, own_gap - other_gap) if role == "fast" else (-1, other_gap - own_gap)
    losses = softplus(-beta * (x_w - x_l)) + sign * alpha * softplus(-beta * lead)
    return rewarded(losses, beta * x_w, beta * x_l)
