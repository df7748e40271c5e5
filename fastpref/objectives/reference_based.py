# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives on log-ratios to a reference model.

Every function takes ``(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
ref_rejected_logps)``, each ``(P,)`` sums over the scored tokens, and returns ``PairLosses`` whose
rewards are ``beta`` times the log-ratio. For a uniform reference pass zeros. In the formulas
x = log(policy / reference), w the chosen and l the rejected response.
"""

from typing import Literal

import torch
from torch import Tensor

from .registry import objective
from .results import PairLosses
from .signature import Filled, LabelSmoothing, Positive
from .terms import bradley_terry_nll, log_ratio, per_token


@objective(unit="pair", scope="pair", needs_reference=True)
def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Positive = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
) -> PairLosses:
    """Direct preference optimization; with ``label_smoothing`` > 0, conservative DPO.

        m = beta (x_w - x_l)
        loss = -(1 - eps) log sigmoid(m) - eps log sigmoid(-m) = softplus(-m) + eps m

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, "A note on DPO with
    noisy preferences". The default beta is the paper's. cDPO is bounded below and biased by design;
    the unbiased estimate under label noise is another objective (robust DPO).
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = bradley_terry_nll(beta * (chosen - rejected), label_smoothing)
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def ipo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Filled | None = None,
    rejected_lengths: Filled | None = None,
    beta: Positive = 0.1,
    normalize: Literal["mean", "sum"] = "mean",
) -> PairLosses:
    """Identity preference optimization: a regression of the log-ratio gap onto 1 / (2 beta).

        loss = (d - 1 / (2 beta))^2
        d = x_w / n_w - x_l / n_l  ("mean", lengths needed)  or  x_w - x_l  ("sum")

    Azar et al. 2023, arXiv:2310.12036, eq. 17 (beta is their tau). The equation has the sum; the
    mean over tokens is what the authors ran and trainers default to. An empty response counts as
    mean 0. Rewards are beta x, not divided by length.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    if normalize == "mean":
        gap = per_token(chosen, chosen_lengths) - per_token(rejected, rejected_lengths)
    else:
        gap = chosen - rejected
    losses = (gap - 1 / (2 * beta)).square()
    return PairLosses(losses, beta * chosen, beta * rejected)


@objective(unit="pair", scope="pair", needs_reference=True)
def hinge(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: Positive = 0.1,
) -> PairLosses:
    """Hinge loss on the DPO margin.

        loss = max(0, 1 - beta (x_w - x_l))

    Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425, with the normalised margin of Liu et al. 2023
    (RSO), arXiv:2309.06657. The gradient at the kink is 0.
    """
    chosen = log_ratio(policy_chosen_logps, ref_chosen_logps)
    rejected = log_ratio(policy_rejected_logps, ref_rejected_logps)
    losses = torch.relu(1 - beta * (chosen - rejected))
    return PairLosses(losses, beta * chosen, beta * rejected)
