# SPDX-License-Identifier: Apache-2.0
"""The terms the objectives are written in, each in the form that is stable in fp32."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


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


def bradley_terry_nll(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin), as softplus(-m) + eps m."""
    return softplus(-margin) + label_smoothing * margin
