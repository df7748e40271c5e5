# SPDX-License-Identifier: Apache-2.0
"""Scoring in plain torch with the whole logit matrix, at any dtype. What every other path is
measured against.

At float64 it is the reference; at the input dtype it is "eager", whose error bounds the error
contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import TokenScores
from .types import statistics_dtype


def plain_scores(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    """Every output of ``fastpref.linear_logprob``, differentiable by autograd, from logits of shape
    (..., V)."""
    logits = (hidden @ weight.t()).to(statistics_dtype(hidden.dtype))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    # A cap maps a bias of -inf to an ordinary logit.
    allowed = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
    if bias is not None and softcap is None:
        allowed = bias != -torch.inf
    scored = target != ignore_index
    index = torch.where(scored, target, 0)[..., None]
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    own = logits.gather(-1, index)
    values = TokenScores(
        logp=log_probs.gather(-1, index)[..., 0],
        entropy=-torch.where(probs > 0, probs * log_probs, 0.0).sum(-1),
        log_sum_sq_probs=(2 * log_probs).logsumexp(-1),
        mean_logits=torch.where(allowed, logits, 0.0).sum(-1) / allowed.sum(),
        is_top1=(logits > own).sum(-1) == 0,
        lse=logits.logsumexp(-1),
    )
    return TokenScores(
        *(torch.where(scored, value, 0) if value is not None else None for value in values)
    )
