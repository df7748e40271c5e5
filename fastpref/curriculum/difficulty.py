# SPDX-License-Identifier: Apache-2.0
"""How hard pairs are, and what they weigh for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.informed import madpo_weights
from .checks import number, numbers


def vote_difficulty(scores: Tensor) -> Tensor:
    """How hard pairs are, by the votes of several scorers, each against its own distribution.

        vote = Phi((gap - mean) / std) of each scorer,  difficulty = 1 - sum_m w_m vote_m
        w_m  = share of pairs that scorer m ranks right, normalised over the scorers

    After DA-DPO (Qiu et al. 2026, arXiv:2601.00623), in which models of different kinds vote on how
    far apart the responses of a pair are. That the votes know each scorer's distribution is the
    paper's; this normalisation and these weights are a reading of it, not confirmed at the source.
    Its loss is the objective ``da_dpo``, with ``reward_margin=1 - vote_difficulty(scores)``.

    Args:
        scores: (M, P), of each scorer the score of the chosen response minus the rejected one's.

    Returns:
        (P,) in [0, 1], higher is harder. A scorer that tells no pairs apart votes 1/2 for all.
    """
    gaps = numbers("scores", scores, "(M, P)")
    if len(gaps) == 0:
        raise ValueError(f"scores must be of at least one scorer, got {tuple(gaps.shape)}")
    wide = gaps.double()
    centred = wide - wide.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    # What rounding leaves of equal gaps is no distribution.
    flat = std <= 1e-12 * wide.abs().amax(1, keepdim=True) if wide.shape[1] else std == 0
    votes: Tensor = torch.special.ndtr(torch.where(flat, 0.0, centred / std))
    right = ((wide > 0).double() + 0.5 * (wide == 0).double()).mean(1)
    total = right.sum()
    weights = torch.where(total > 0, right / total, 1 / len(right))
    return (1 - weights @ votes).to(gaps.dtype)


def margin_weights(
    reward_margin: Tensor,
    *,
    c_min: float = 0.5,
    c_max: float = 2.0,
    slope: float = 1.0,
    tau: float = 2.0,
) -> Tensor:
    """What MADPO weighs pairs with, by a reward model's margins: hard ones more, easy ones less.

    The weights that the objective ``madpo`` computes (Rho 2025, arXiv:2510.05342), its formula and
    defaults there, by themselves: to look at them, or to sample by them.

    Args:
        reward_margin: (P,), reward of the chosen response minus that of the rejected one.
        c_min: in (0, 1], what an easy pair's reward difference is multiplied by.
        c_max: at least 1, the same of a hard pair.
        slope: > 0.
        tau: > 0, the margin at which a pair keeps its weight.

    Returns:
        (P,), positive.
    """
    margin = numbers("reward_margin", reward_margin, "(P,)")
    low = number("c_min", c_min, 0.0, 1.0, open_low=True)
    high = number("c_max", c_max, 1.0)
    slope = number("slope", slope, 0.0, open_low=True)
    tau = number("tau", tau, 0.0, open_low=True)
    wide = torch.as_tensor(low, dtype=margin.dtype, device=margin.device)
    return madpo_weights(margin, wide, high, slope, tau)
