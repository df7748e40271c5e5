# SPDX-License-Identifier: Apache-2.0
"""Losses of rows of a data set from their papers' formulas, in plain torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Scores = Callable[[list[int], list[int]], Tensor]  # (prompt, completion) -> (T,)
SIDES = ("chosen", "rejected")


def dpo(scores: Scores, rows: Sequence[dict[str, Any]], beta: float) -> Tensor:
    losses = []
    for row in rows:
        chosen, rejected = (scores(row["prompt_ids"], row[f"{one}_ids"]).sum() for one in SIDES)
        gap = chosen - rejected - (row["ref_chosen_logps"] - row["ref_rejected_logps"])
        losses.append(-logsigmoid(beta * gap))
    return torch.stack(losses).mean()


def simpo(scores: Scores, rows: Sequence[dict[str, Any]], beta: float, gamma: float) -> Tensor:
    losses = []
    for row in rows:
        chosen, rejected = (scores(row["prompt_ids"], row[f"{one}_ids"]).mean() for one in SIDES)
        losses.append(-logsigmoid(beta * (chosen - rejected) - gamma))
    return torch.stack(losses).mean()


def orpo(scores: Scores, rows: Sequence[dict[str, Any]], beta: float) -> Tensor:
    losses = []
    for row in rows:
        chosen, rejected = (scores(row["prompt_ids"], row[f"{one}_ids"]).mean() for one in SIDES)
        odds = [one - torch.log1p(-one.exp()) for one in (chosen, rejected)]
        losses.append(-chosen - beta * logsigmoid(odds[0] - odds[1]))
    return torch.stack(losses).mean()


def kto(scores: Scores, rows: Sequence[dict[str, Any]], beta: float) -> Tensor:
    """The baseline is that of these rows, and no zero."""
    ratios = torch.stack(
        [scores(row["prompt_ids"], row["completion_ids"]).sum() - row["ref_logps"] for row in rows]
    )
    baseline = ratios.detach().mean()
    assert baseline > 0.1
    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in rows])
    return (1 - torch.sigmoid(signs * beta * (ratios - baseline))).mean()


def plackett_luce(scores: Scores, rows: Sequence[dict[str, Any]], beta: float) -> Tensor:
    losses = []
    for row in rows:
        order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
        rewards = torch.stack(
            [
                beta
                * (scores(row["prompt_ids"], row["completions_ids"][i]).sum() - row["ref_logps"][i])
                for i in order
            ]
        )
        places = [rewards[k:].logsumexp(0) - rewards[k] for k in range(len(order))]
        losses.append(torch.stack(places).sum())
    return torch.stack(losses).mean()


def odpo(scores: Scores, rows: Sequence[dict[str, Any]], beta: float, alpha: float) -> Tensor:
    losses = []
    for row in rows:
        chosen, rejected = (scores(row["prompt_ids"], row[f"{one}_ids"]).sum() for one in SIDES)
        gap = chosen - rejected - (row["ref_chosen_logps"] - row["ref_rejected_logps"])
        offset = alpha * torch.tensor(row["reward_margin"]).log()
        losses.append(-logsigmoid(beta * gap - offset))
    return torch.stack(losses).mean()


def apo_zero_unpaired(scores: Scores, rows: Sequence[dict[str, Any]], beta: float) -> Tensor:
    losses = []
    for row in rows:
        sign = 1.0 if row["label"] else -1.0
        ratio = scores(row["prompt_ids"], row["completion_ids"]).sum() - row["ref_logps"]
        losses.append(torch.sigmoid(-sign * beta * ratio))
    return torch.stack(losses).mean()


def rewards(scores: Scores, row: dict[str, Any], beta: float) -> list[float]:
    """beta times the log-ratio of each response of a row, chosen first."""
    if "chosen_ids" in row:
        responses = [row[f"{one}_ids"] for one in SIDES]
        reference = [row[f"ref_{one}_logps"] for one in SIDES]
    elif "completions_ids" in row:
        responses, reference = row["completions_ids"], row["ref_logps"]
    else:
        responses, reference = [row["completion_ids"]], [row["ref_logps"]]
    logps = [float(scores(row["prompt_ids"], one).sum()) for one in responses]
    return [beta * (one - other) for one, other in zip(logps, reference, strict=True)]
