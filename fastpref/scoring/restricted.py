# SPDX-License-Identifier: Apache-2.0
"""Scores within a set of allowed ids for each token, as a top-k or top-p sampler draws from: the
softmax is that over the logits of the set."""

from __future__ import annotations

import torch
from torch import Tensor

from .chosen import chosen_logits
from .head import Model
from .request import Request
from .statistics import TokenScores


def restricted_scores(
    request: Request,
    model: Model,
    target: Tensor,
    ids: Tensor,
    outputs: tuple[str, ...],
    temperature: Tensor | None,
) -> TokenScores:
    """``outputs`` within the sets ``ids`` (..., K), negative ids left out and each other one
    counted once, at ``temperature`` (...) where positions have their own; NaN (False) where the
    target is not in its set, 0 where it is not scored."""
    scored = target != request.ignore_index
    # What is left out comes last, where no row of the weight is gathered for it.
    ids = ids.sort(-1, descending=True).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[..., 1:] = ids[..., 1:] == ids[..., :-1]
    member = (ids >= 0) & ~repeated
    some = ids.masked_fill(~member, -1)
    logits = chosen_logits(request, model, some, target, temperature)
    logits = logits.masked_fill(~member, -torch.inf)
    own = member & (ids == target[..., None])
    top = logits.detach().amax(-1)
    answers = own.any(-1) & top.isfinite()
    # Rows without an answer must not make NaN of other rows' gradients.
    logits = logits.masked_fill(~answers[..., None], 0)
    values = {
        name: value.masked_fill(~answers, False if value.dtype == torch.bool else torch.nan)
        for name, value in _scores(logits, own, outputs).items()
    }
    return TokenScores(**{name: value.masked_fill(~scored, 0) for name, value in values.items()})


def _scores(logits: Tensor, own: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Of the softmax of each row of logits (..., K), the target's where ``own``."""
    log_probs = logits.log_softmax(-1)
    values: dict[str, Tensor] = {}
    if "logp" in outputs:
        values["logp"] = log_probs.masked_fill(~own, 0).sum(-1)
    if "lse" in outputs:
        values["lse"] = logits.logsumexp(-1)
    if "entropy" in outputs:
        probs = log_probs.exp()
        values["entropy"] = -(probs * log_probs.masked_fill(probs == 0, 0)).sum(-1)
    if "log_sum_sq_probs" in outputs:
        values["log_sum_sq_probs"] = (2 * log_probs.detach()).logsumexp(-1)
    if "mean_logits" in outputs:
        excluded = logits == -torch.inf
        values["mean_logits"] = logits.masked_fill(excluded, 0).sum(-1) / (~excluded).sum(-1)
    if "is_top1" in outputs:
        values["is_top1"] = (own & (logits == logits.amax(-1, keepdim=True))).any(-1)
    return values
