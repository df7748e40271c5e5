# SPDX-License-Identifier: Apache-2.0
"""The terms the objectives are written in, each in the form that is stable in fp32."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .signature import PerUnit


def log_ratio(policy_logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """log(policy / reference) of each response."""
    return policy_logps - cast(Tensor, ref_logps)  # None was refused before the objective ran


def per_token(total: Tensor, lengths: Tensor | None) -> Tensor:
    """``total / lengths``, and 0 for an empty response."""
    if lengths is None:
        raise ValueError(
            "a per-token mean needs the number of scored tokens; pass chosen_lengths and "
            "rejected_lengths (lengths), got None"
        )
    return torch.where(lengths > 0, total / lengths.clamp(min=1), 0)


def mean_nll(nll: Tensor | None, logps: Tensor, lengths: Tensor | None) -> Tensor:
    """``nll`` where given, else the mean negative log-likelihood of a token of the response."""
    return per_token(-logps, lengths) if nll is None else nll


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). torch's own turns into x above 20, an error of 2e-9 that fp64 would show."""
    return -F.logsigmoid(-x)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x <= 0; -inf at 0, so keep away from there."""
    near = x > -math.log(2)
    # Each branch only sees what it is right for: an infinite slope times 0 would be NaN.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def bradley_terry_nll(margin: Tensor, label_smoothing: PerUnit = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin), as softplus(-m) + eps m."""
    return softplus(-margin) + label_smoothing * margin


def sft_term(
    weight: PerUnit, nll: Tensor | None, logps: Tensor, lengths: Tensor | None
) -> Tensor | float:
    """``weight`` times ``mean_nll``, which a weight of 0 does not need."""
    if nll is None and lengths is None and not isinstance(weight, Tensor) and weight == 0:
        return 0.0
    return weight * mean_nll(nll, logps, lengths)


def saturating_expm1(x: Tensor, limit: float = 60.0) -> Tensor:
    """exp(x) - 1, continued by its tangent above 60: finite in fp32 at 1e5, and never flat.

    A ``limit`` of 20 keeps the square finite too.
    """
    return torch.expm1(x.clamp(max=limit)) + math.exp(limit) * torch.relu(x - limit)


def saturating_exp(x: Tensor) -> Tensor:
    """exp(x), continued by its tangent above 60 like ``saturating_expm1``; exact far below 0."""
    return torch.exp(x.clamp(max=60.0)) + math.exp(60.0) * torch.relu(x - 60.0)


def mallows_dispersion(ref_entropy: Tensor, phi: PerUnit) -> Tensor:
    """How sharply a prompt is answered, -phi log(entropy over log V): the weight of its margin."""
    return -phi * torch.log(ref_entropy)


def by_row(value: PerUnit) -> PerUnit:
    """One value a row, (B,), as (B, 1), beside the (B, T) of what the rows hold."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def filled(value: PerUnit, like: Tensor) -> Tensor:
    """``value`` at every entry of ``like``."""
    if isinstance(value, Tensor):
        return value.expand_as(like)
    return torch.full_like(like, value)


def clamp(values: Tensor, low: PerUnit | None, high: PerUnit | None) -> Tensor:
    """``values.clamp(low, high)``, where either may be a number beside a tensor."""
    tensors = isinstance(low, Tensor) or isinstance(high, Tensor)
    ends: list[Any] = [
        filled(one, values) if tensors and isinstance(one, int | float) else one
        for one in (low, high)
    ]
    return values.clamp(*ends)


def divisor(beta: PerUnit) -> PerUnit:
    """``beta`` to divide by, 1 where it is 0; what comes of it there goes by ``weighed``."""
    return torch.where(beta > 0, beta, 1) if isinstance(beta, Tensor) else beta


def weighed(losses: Tensor, beta: PerUnit) -> Tensor:
    """0 where ``beta`` is 0: no weight, where the formula divides by it."""
    return torch.where(beta > 0, losses, 0) if isinstance(beta, Tensor) else losses
