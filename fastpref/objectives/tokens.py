# SPDX-License-Identifier: Apache-2.0
"""The tokens of a batch as policy-gradient objectives read them: masked, with their ratios to the
old policy, their advantages and their divergence from the reference."""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .batch import count_and_sum
from .results import TokenLosses
from .signature import Group, PerUnit
from .terms import by_row, clamp, filled, per_token, saturating_exp, saturating_expm1

RatioLevel: TypeAlias = Literal["token", "sequence"]
Switch: TypeAlias = Literal[False, True]


class Tokens(NamedTuple):
    """(B, T) each: 0 where the mask is 0, but ``ratio``, which is 1 there or that of its row."""

    scored: Tensor
    logp: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    kl: Tensor | None

    def mean(self, values: Tensor) -> Tensor:
        """(B,) means over the scored tokens of each response."""
        return per_token(values.sum(-1), self.scored.sum(-1))

    def batch_mean(self, values: Tensor, group: Group = None) -> Tensor:
        """(B,) shares of the mean over all scored tokens: it is their mean, over all ranks."""
        rows, tokens = count_and_sum(self.scored.sum(-1), group)
        return values.sum(-1) * rows / tokens.clamp(min=1)

    def either(self, condition: Tensor, yes: PerUnit, no: PerUnit) -> Tensor:
        """(B, T): of two numbers, or of one value each a response, by ``condition``."""
        there, elsewhere = (filled(by_row(one), self.logp) for one in (yes, no))
        return torch.where(condition, there, elsewhere)

    def penalty(self, beta: PerUnit) -> Tensor | float:
        if self.kl is not None:
            return by_row(beta) * self.kl
        if isinstance(beta, Tensor) or beta > 0:
            value = "" if isinstance(beta, Tensor) else f"={beta:g}"
            raise ValueError(
                f"beta{value} weighs the divergence from a reference; pass ref_token_logp, got "
                "None, or beta=0"
            )
        return 0.0

    def result(self, losses: Tensor, is_clipped: Tensor | None = None) -> TokenLosses:
        """None: nothing is clipped."""
        is_clipped = torch.zeros_like(self.scored) if is_clipped is None else is_clipped
        return TokenLosses(losses, torch.where(self.scored, self.ratio, 0), is_clipped, self.kl)


def read(
    mask: Tensor,
    advantages: Tensor,
    logps: tuple[Tensor, Tensor | None, Tensor | None],
    level: RatioLevel = "token",
    corrects_kl: bool = False,
) -> Tokens:
    """``logps`` are of the policy, of the old policy and of the reference.

    Ratios are those of each token, or on the sequence level exp(mean_t log r) at all tokens of a
    response. ``corrects_kl`` multiplies the divergence by them.
    """
    policy, old, ref = logps
    scored = mask != 0
    logp = torch.where(scored, policy, 0)
    log_ratio = logp - (logp.detach() if old is None else torch.where(scored, old, 0))
    log_weight = log_ratio
    if level == "sequence":
        log_weight = per_token(log_ratio.sum(-1), scored.sum(-1))[:, None].expand_as(log_ratio)
    per_response = advantages.dim() == 1
    advantages = torch.where(scored, advantages[:, None] if per_response else advantages, 0)
    kl = None
    if ref is not None:
        away = torch.where(scored, ref, 0) - logp
        kl = saturating_expm1(away) - away
        if corrects_kl:
            # Continued by their tangents sooner, so that the product too is finite in fp32.
            weight = saturating_expm1(log_weight, limit=20.0) + 1
            kl = weight * (saturating_expm1(away, limit=20.0) - away)
    return Tokens(scored, logp, log_ratio, saturating_exp(log_weight), advantages, kl)


def clipped(
    tokens: Tokens, low: PerUnit, high: PerUnit, delta: PerUnit | None = None
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A) of each token, and where the clip took its gradient away."""
    ratio, advantages = tokens.ratio, tokens.advantages
    low, high = by_row(low), by_row(high)
    capped = ratio if delta is None else clamp(ratio, None, by_row(delta))
    values = -torch.minimum(capped * advantages, clamp(ratio, 1 - low, 1 + high) * advantages)
    is_clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return values, is_clipped
