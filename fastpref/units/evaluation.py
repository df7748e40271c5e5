# SPDX-License-Identifier: Apache-2.0
"""An objective on the numbers of a batch: its losses, the rewards of each row, and its metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import ListLosses, Objective, TokenLosses, UnitLosses
from .layouts import Arrangement
from .numbers import Numbers, mean
from .pair_head import pair_head


class Evaluated(NamedTuple):
    losses: Tensor  # one a unit, differentiable
    rewards: Tensor  # (B,) in row order, detached
    metrics: dict[str, Tensor]  # 0-dim, detached


def evaluate(
    objective: Objective, numbers: Numbers, arrangement: Arrangement, extras: dict[str, Tensor]
) -> Evaluated:
    """``extras`` complete."""
    if objective.unit == "token":
        return _tokens(objective, numbers, extras)
    logps = arrangement.split(numbers.logps)
    if numbers.ref_logps is not None:
        logps += arrangement.split(numbers.ref_logps)
    if objective.unit == "pair":
        pairs = pair_head(objective, *logps, **extras)
        rewards = arrangement.join(pairs.chosen_rewards, pairs.rejected_rewards)
        return Evaluated(pairs.losses, rewards, pairs.metrics)
    result = objective(*logps, **extras)
    if not isinstance(result, UnitLosses | ListLosses):
        raise TypeError(f"{objective.name} returned {type(result).__name__}")
    own = logps[0].detach()
    if objective.unit == "list":
        metrics = _of_lists(result.rewards, own, extras)
    else:
        metrics = {"rewards/mean": mean(result.rewards), "logps/mean": mean(own)}
        if "labels" in extras:
            metrics |= _by_label(result.rewards, own, extras["labels"] != 0)
    return Evaluated(result.losses, arrangement.join(result.rewards), metrics)


def _of_lists(rewards: Tensor, logps: Tensor, extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the responses that are there, and the share of lists whose best response has the
    largest reward, of lists with two at least."""
    mask = extras.get("mask")
    present = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    count = present.sum().clamp(min=1)
    metrics = {
        "rewards/mean": torch.where(present, rewards, 0).sum() / count,
        "logps/mean": torch.where(present, logps, 0).sum() / count,
    }
    quality = extras.get("scores")
    if quality is None and "ranks" in extras:
        quality = -extras["ranks"].float()
    if quality is not None:
        best, found = (
            torch.where(present, values.float(), -torch.inf).argmax(1)
            for values in (quality, rewards)
        )
        ranked = present.sum(1) > 1
        right = ((best == found) & ranked).sum() / ranked.sum().clamp(min=1)
        metrics["rewards/accuracies"] = right.to(rewards.dtype)
    return metrics


def _by_label(rewards: Tensor, logps: Tensor, desirable: Tensor) -> dict[str, Tensor]:
    """Means over the desirable and the undesirable rows; 0 where there are none."""
    metrics = {}
    for side, rows in (("chosen", desirable), ("rejected", ~desirable)):
        count = rows.sum().clamp(min=1)
        for name, values in (("rewards", rewards), ("logps", logps)):
            metrics[f"{name}/{side}"] = torch.where(rows, values, 0).sum() / count
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def _tokens(objective: Objective, numbers: Numbers, extras: dict[str, Tensor]) -> Evaluated:
    """Rewards are log-ratios to the reference, or without one the policy's own log-probs: these
    objectives know rewards only as advantages."""
    if numbers.tokens is None or numbers.lengths is None:
        raise ValueError(
            f"{objective.name} works on tokens, and these are numbers of whole responses; take an "
            "objective of pairs, lists or single responses"
        )
    keywords = dict(extras)
    old = keywords.pop("old_token_logp", None)
    result = objective(numbers.tokens.logp, old, **keywords)
    if not isinstance(result, TokenLosses):
        raise TypeError(f"{objective.name} returned {type(result).__name__}")
    logps, ref_logps = numbers.logps.detach(), numbers.ref_logps
    tokens = numbers.lengths().sum().clamp(min=1)
    metrics = {
        "logps/mean": mean(logps),
        "clip_ratio/region_mean": result.is_clipped.to(logps.dtype).sum() / tokens,
    }
    if result.kl is not None:
        metrics["kl"] = result.kl.sum() / tokens
    return Evaluated(result.losses, logps if ref_logps is None else logps - ref_logps, metrics)
