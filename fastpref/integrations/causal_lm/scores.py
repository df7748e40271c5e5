# SPDX-License-Identifier: Apache-2.0
"""Scores of what goes into a model's output head, and of logits that a model made itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...scoring import linear_logprob
from .head import project, weight_context
from .request import IGNORED
from .transform import LogitTransform


def scores_of_hidden(
    head: nn.Module,
    hidden: Tensor,
    target: Tensor,
    transform: LogitTransform,
    temperature: float | Tensor = 1.0,
    wanted: tuple[str, ...] = ("logp",),
) -> tuple[Tensor, ...]:
    """Without logits. To be called within the head's forward, where its parameters are whole.

    Args:
        head: one that ``head_supported`` knows.
        hidden: (B, T, H), what it is given.
        target: (B, T) int64, -100 where nothing is scored.
        transform: of what it returns.
        temperature: as of ``linear_logprob``.
        wanted: fields of ``TokenScores``.

    Returns:
        Those fields, each (B, T).
    """
    hidden, projection = project(head, hidden)
    weight = projection.weight
    if isinstance(temperature, Tensor):
        temperature = temperature.to(weight.device)
    scores = linear_logprob(
        hidden,
        weight,
        target.to(weight.device),
        bias=projection.bias,
        ignore_index=IGNORED,
        temperature=temperature,
        logit_scale=transform.scale,
        softcap=transform.softcap,
        outputs=wanted,
        vocab_range=projection.rows_below(transform.size),
        tp_group=None if projection.shards is None else projection.shards.group,
        lora=projection.lora,
        weight_context=weight_context(),
    )
    return tuple(getattr(scores, name) for name in wanted)


def scores_of_logits(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    wanted: tuple[str, ...] = ("logp",),
) -> tuple[Tensor, ...]:
    """For heads that cannot be fused: right, in (tokens, vocabulary) memory.

    Args:
        logits: (B, T, V), as the model returns them.
        target, temperature, wanted: as of ``scores_of_hidden``.

    Returns:
        As ``scores_of_hidden``.
    """
    target = target.to(logits.device)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.device)[..., None]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    scored = target != IGNORED
    own = torch.where(scored, target, 0)[..., None]
    logps = logits.log_softmax(-1)
    # An excluded id adds nothing, and 0 times -inf is NaN.
    finite = logits.isfinite()
    values = {
        "logp": logps.gather(-1, own)[..., 0],
        "entropy": -torch.where(finite, logps.exp() * logps, 0.0).sum(-1),
        "log_sum_sq_probs": (2 * logps.detach()).logsumexp(-1),
        "mean_logits": torch.where(finite, logits, 0.0).sum(-1) / finite.sum(-1),
        "is_top1": logits.argmax(-1) == own[..., 0],
    }
    chosen = [values[name] for name in wanted]
    return tuple(torch.where(scored, one, 0).to(one.dtype) for one in chosen)
