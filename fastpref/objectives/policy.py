# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient objectives on the log-probabilities of tokens.

Every function takes ``(policy_token_logp, old_token_logp)``, each ``(B, T)``: old is the policy
that sampled the responses, None that it is the policy itself, unchanged since. ``mask`` ``(B, T)``
is nonzero at scored tokens; no other is read, and NaN there reaches nothing. ``advantages`` are
``(B,)`` or ``(B, T)``. With ``ref_token_logp`` the result's ``kl`` estimates the divergence from
that reference; ``beta`` > 0 adds it to the losses of the tokens and needs it. ``ratio`` and ``kl``
are 0 where the mask is; an empty response has loss 0 and counts in B.

With ``importance_sampling_level="sequence"`` s = exp(mean_t log r) stands at every token for r.
``use_bias_correction_kl`` multiplies k3 by that ratio, which carries a gradient: an unbiased
estimate off policy (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv:2512.02556).

In the formulas r = policy / old of a token, A its advantage, el and eh the epsilons,
d = log(reference / policy), k3 = exp(d) - d - 1; mean_t and sum_t run over the scored tokens of a
response, N is their number in the whole batch. Above 60 the exponential of a log-ratio is continued
by its tangent.

With ``dp_group`` the B responses and N tokens are those of all its ranks, each with any number of
them, none too; losses are this rank's, and where every rank takes their sum, losses and gradients
add up to those of one process. Every rank must call the objective.
"""

from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from .registry import objective
from .results import TokenLosses
from .signature import Domain, Extra, ExtraFacts, Group, NotNegative, PerResponseOrToken, Positive
from .terms import by_row, clamp, saturating_exp, saturating_expm1
from .tokens import RatioLevel, Switch, clipped, read

SamplerRatio: TypeAlias = Annotated[
    Tensor, ExtraFacts(shapes=("unit", "logps"), domain=Domain(low=0.0, includes=(0.0,)))
]


@objective(unit="token", scope="unit", needs_reference=False, loss_type="grpo")
def grpo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    beta: NotNegative = 0.0,
    epsilon_low: NotNegative = 0.2,
    epsilon_high: NotNegative = 0.2,
    delta: Positive | None = None,
    importance_sampling_level: RatioLevel = "token",
    use_bias_correction_kl: Switch = False,
) -> TokenLosses:
    """Group relative policy optimization: the clipped surrogate, a mean over each response.

        loss = mean_t [-min(r A, clip(r, 1 - el, 1 + eh) A) + beta k3]

    Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, eq. 3 and 4, where beta is 0.04; the defaults
    are those trainers have. ``delta`` caps r in the first term, which bounds the loss of A < 0 too
    (INTELLECT-2; more than 1 + epsilon_high is meant). Not group-robust preference optimization.
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, importance_sampling_level, use_bias_correction_kl)
    values, is_clipped = clipped(tokens, epsilon_low, epsilon_high, delta)
    return tokens.result(tokens.mean(values + tokens.penalty(beta)), is_clipped)


@objective(unit="token", scope="batch", needs_reference=False, loss_type="bnpo")
def bnpo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    beta: NotNegative = 0.0,
    epsilon_low: NotNegative = 0.2,
    epsilon_high: NotNegative = 0.2,
    delta: Positive | None = None,
    importance_sampling_level: RatioLevel = "token",
    use_bias_correction_kl: Switch = False,
) -> TokenLosses:
    """The clipped surrogate of GRPO as a mean over all tokens of this process's batch.

        loss = (B / N) sum_t [-min(r A, clip(r, 1 - el, 1 + eh) A) + beta k3]

    What TRL calls bnpo, on the surrogate of Shao et al. 2024, arXiv:2402.03300; a batch of one is
    GRPO's loss. There is no group of ranks to it: over the tokens of all processes it is ``dapo``.
    Not beta normalization policy optimization (arXiv:2506.02864), which is another way to make
    advantages.
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, importance_sampling_level, use_bias_correction_kl)
    values, is_clipped = clipped(tokens, epsilon_low, epsilon_high, delta)
    return tokens.result(tokens.batch_mean(values + tokens.penalty(beta)), is_clipped)


@objective(unit="token", scope="unit", needs_reference=False, loss_type="dr_grpo")
def dr_grpo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    max_completion_length: Positive,
    beta: NotNegative = 0.0,
    epsilon_low: NotNegative = 0.2,
    epsilon_high: NotNegative = 0.2,
    delta: Positive | None = None,
    importance_sampling_level: RatioLevel = "token",
    use_bias_correction_kl: Switch = False,
) -> TokenLosses:
    """GRPO done right: the clipped surrogate divided by a constant, which favours no length.

        loss = sum_t [-min(r A, clip(r, 1 - el, 1 + eh) A) + beta k3] / L
        L = max_completion_length

    Liu et al. 2025, arXiv:2503.20783. Its advantages are only centred:
    ``group_advantages(..., normalize="none")``. ``max_completion_length`` has no default: the
    longest response the sampler may return.
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, importance_sampling_level, use_bias_correction_kl)
    values, is_clipped = clipped(tokens, epsilon_low, epsilon_high, delta)
    sums = (values + tokens.penalty(beta)).sum(-1)
    return tokens.result(sums / max_completion_length, is_clipped)


@objective(unit="token", scope="batch", needs_reference=False, loss_type="dapo")
def dapo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    beta: NotNegative = 0.0,
    epsilon_low: NotNegative = 0.2,
    epsilon_high: NotNegative = 0.28,
    delta: Positive | None = None,
    importance_sampling_level: RatioLevel = "token",
    use_bias_correction_kl: Switch = False,
    dp_group: Group = None,
) -> TokenLosses:
    """Decoupled clip policy optimization: a higher upper clip, a mean over all tokens.

        loss = (B / N) sum_t [-min(r A, clip(r, 1 - el, 1 + eh) A) + beta k3]

    Yu et al. 2025, arXiv:2503.14476, whose clip range is the default. B and N are those of all
    ranks of ``dp_group``, however many each holds, and the ranks' summed losses are those of one
    process. Dynamic sampling and the penalty on overlong responses are matters of the sampler and
    of the reward. Not direct advantage policy optimization (arXiv:2412.18279).
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, importance_sampling_level, use_bias_correction_kl)
    values, is_clipped = clipped(tokens, epsilon_low, epsilon_high, delta)
    return tokens.result(tokens.batch_mean(values + tokens.penalty(beta), dp_group), is_clipped)


@objective(unit="token", scope="unit", needs_reference=False)
def gspo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    beta: NotNegative = 0.0,
    epsilon_low: NotNegative = 0.0003,
    epsilon_high: NotNegative = 0.0004,
    use_bias_correction_kl: Switch = False,
) -> TokenLosses:
    """Group sequence policy optimization: one ratio a response, the geometric mean of its tokens'.

        s = exp(mean_t log r)
        loss = mean_t [-min(s A, clip(s, 1 - el, 1 + eh) A) + beta k3]

    Zheng et al. 2025, arXiv:2507.18071, eq. 5, whose clip range is the default. The result's
    ``ratio`` is s at every token.
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, "sequence", use_bias_correction_kl)
    values, is_clipped = clipped(tokens, epsilon_low, epsilon_high)
    return tokens.result(tokens.mean(values + tokens.penalty(beta)), is_clipped)


@objective(unit="token", scope="batch", needs_reference=False, loss_type="cispo")
def cispo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    beta: NotNegative = 0.0,
    epsilon_high: Positive = 5.0,
    use_bias_correction_kl: Switch = False,
    dp_group: Group = None,
) -> TokenLosses:
    """Clipped importance sampling: the weight is clipped, so every token keeps its gradient.

        loss = (B / N) sum_t [-sg[min(r, eh)] A log policy + beta k3]

    MiniMax 2025 (MiniMax-M1), arXiv:2506.13585, without a lower bound as there. B and N are those
    of all ranks of ``dp_group``, however many each holds, and the ranks' summed losses are those of
    one process. ``epsilon_high`` bounds r itself, not its distance from 1, as in ScaleRL
    (arXiv:2510.13786), whose value is the default.
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, "token", use_bias_correction_kl)
    bound = by_row(epsilon_high)
    weights = clamp(tokens.ratio, None, bound).detach()
    values = -weights * tokens.advantages * tokens.logp
    is_clipped = (tokens.ratio > bound) & (tokens.advantages > 0)
    return tokens.result(tokens.batch_mean(values + tokens.penalty(beta), dp_group), is_clipped)


@objective(unit="token", scope="unit", needs_reference=False, loss_type="sapo")
def sapo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    beta: NotNegative = 0.0,
    tau_positive: Positive = 1.0,
    tau_negative: Positive = 1.05,
    use_bias_correction_kl: Switch = False,
) -> TokenLosses:
    """Soft adaptive policy optimization: a sigmoid gate where others clip.

        loss = mean_t [-A (4 / tau) S(tau (r - 1)) + beta k3]
        tau = tau_positive where A > 0, else tau_negative

    Gao et al. 2025, arXiv:2511.20347, whose temperatures are the defaults. Nothing is clipped.
    Not self-augmented preference optimization (arXiv:2405.20830).
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, "token", use_bias_correction_kl)
    positive = tokens.advantages > 0
    tau = tokens.either(positive, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * saturating_expm1(tokens.log_ratio)) * (4 / tau)
    losses = tokens.mean(-tokens.advantages * gate + tokens.penalty(beta))
    return tokens.result(losses)


@objective(unit="token", scope="unit", needs_reference=False, loss_type="luspo")
def luspo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    beta: NotNegative = 0.0,
    epsilon_low: NotNegative = 0.0003,
    epsilon_high: NotNegative = 0.0004,
    delta: Positive | None = None,
    importance_sampling_level: RatioLevel = "sequence",
    use_bias_correction_kl: Switch = False,
) -> TokenLosses:
    """Length-unbiased sequence policy optimization: GSPO times the length of the response.

        s = exp(mean_t log r)
        loss = sum_t [-min(s A, clip(s, 1 - el, 1 + eh) A) + beta k3]

    Liu et al. 2026, arXiv:2602.05261. The clip range is that of ``gspo``; the paper's own was not
    confirmed at the source. A mean of these losses grows with the lengths: mind the learning rate.
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, importance_sampling_level, use_bias_correction_kl)
    values, is_clipped = clipped(tokens, epsilon_low, epsilon_high, delta)
    return tokens.result((values + tokens.penalty(beta)).sum(-1), is_clipped)


@objective(unit="token", scope="batch", needs_reference=False, loss_type="vespo")
def vespo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    sampler_ratio: SamplerRatio | None = None,
    beta: NotNegative = 0.0,
    k_positive: Positive = 2.0,
    lambda_positive: Positive = 3.0,
    k_negative: Positive = 3.0,
    lambda_negative: Positive = 2.0,
    use_bias_correction_kl: Switch = False,
    dp_group: Group = None,
) -> TokenLosses:
    """Variational sequence-level soft policy optimization: a smooth weight of the whole response.

        w = prod_t r
        loss = (B / N) sum_t [-sg[w^k exp(lambda (1 - w))] A log policy + beta k3]
        k = k_positive where A >= 0, else k_negative
        lambda = lambda_positive where A >= 0, else lambda_negative

    Shen et al. 2026, arXiv:2602.10693; the defaults are those of TRL. ``sampler_ratio`` is old /
    sampler of a response or of each token, where the sampler's likelihoods differ from the old
    policy's; its product multiplies w. The result's ``ratio`` is r of each token, and nothing is
    clipped. B and N are those of all ranks of ``dp_group``, however many each holds, and the ranks'
    summed losses are those of one process.
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps, "token", use_bias_correction_kl)
    log_weight = tokens.log_ratio.detach().sum(-1, keepdim=True)
    if sampler_ratio is not None:
        correction = sampler_ratio.log()
        if correction.dim() == 2:
            correction = torch.where(tokens.scored, correction, 0).sum(-1)
        log_weight = log_weight + correction[:, None]
    positive = tokens.advantages >= 0
    power = tokens.either(positive, k_positive, k_negative)
    rate = tokens.either(positive, lambda_positive, lambda_negative)
    weights = saturating_exp(power * log_weight - rate * saturating_expm1(log_weight))
    values = -weights.detach() * tokens.advantages * tokens.logp
    return tokens.result(tokens.batch_mean(values + tokens.penalty(beta), dp_group))


@objective(unit="token", scope="unit", needs_reference=False)
def gmpo(
    policy_token_logp: Tensor,
    old_token_logp: Tensor | None = None,
    *,
    mask: Extra,
    advantages: PerResponseOrToken,
    ref_token_logp: Extra | None = None,
    beta: NotNegative = 0.0,
    epsilon_low: NotNegative = 0.4,
    epsilon_high: NotNegative = 0.4,
) -> TokenLosses:
    """Geometric-mean policy optimization: tokens are clipped, then their ratios averaged in logs.

        c = min(log r, eh) where A > 0, max(log r, -el) where A < 0
        loss = mean_t [-A exp(mean_t c) + beta k3]

    Zhao et al. 2025, arXiv:2507.20673; the range is that of the paper's experiments,
    (exp(-0.4), exp(0.4)). The result's ``ratio`` is r of each token, before the clip.
    """
    logps = policy_token_logp, old_token_logp, ref_token_logp
    tokens = read(mask, advantages, logps)
    low, high = -by_row(epsilon_low), by_row(epsilon_high)
    is_clipped = ((tokens.log_ratio > high) & (tokens.advantages > 0)) | (
        (tokens.log_ratio < low) & (tokens.advantages < 0)
    )
    bounded = clamp(tokens.log_ratio, low, high)
    mean_log_ratio = tokens.mean(torch.where(is_clipped, bounded, tokens.log_ratio))
    ratio = saturating_exp(mean_log_ratio)
    losses = tokens.mean(-tokens.advantages * ratio[:, None] + tokens.penalty(beta))
    return tokens.result(losses, is_clipped)
