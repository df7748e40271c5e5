# SPDX-License-Identifier: Apache-2.0
"""Numbers to losses, and losses to the one that is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..objectives import Objective
from ..objectives.checks import hint, is_number
from ..objectives.reading import readable
from .evaluation import evaluate
from .filling import filled_extras
from .layouts import Arrangement
from .numbers import Numbers, mean
from .output import PreferenceOutput, output_of

LossReduction: TypeAlias = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[LossReduction, ...] = ("mean", "sum", "none")


def unit_loss(
    objective: Objective,
    numbers: Numbers,
    arrangement: Arrangement,
    *,
    extras: Mapping[str, Tensor],
    reduction: LossReduction = "mean",
    denominator: float | Tensor | None = None,
) -> PreferenceOutput:
    """The loss of B rows under ``objective``.

    Args:
        objective: with its hyperparameters set (configuration.py).
        numbers: log-probs, or with a reference of zeros log-ratios, and what extras are made of.
        arrangement: which rows are compared, of ``layouts.arrange``.
        extras: what else the objective takes, as the caller gives it; the others are made of
            ``numbers``.
        reduction, denominator: as in ``preference_loss``, checked before.

    Raises:
        ValueError: naming an extra that is neither given nor made.
        TypeError, ValueError: as the objective does.
    """
    complete = filled_extras(objective, extras, numbers, arrangement)
    losses, rewards, metrics = evaluate(objective, numbers, arrangement, complete)
    return output_of(
        arrangement,
        _reduced(losses, reduction, denominator),
        losses.detach(),
        rewards,
        numbers.logps,
        numbers.ref_logps,
        metrics,
    )


def _reduced(
    losses: Tensor, reduction: LossReduction, denominator: float | Tensor | None
) -> Tensor:
    if reduction == "mean" and denominator is None:
        return mean(losses)
    loss = losses if reduction == "none" else losses.sum()
    return loss if denominator is None else loss / denominator


def check_reduction(reduction: str, denominator: float | Tensor | None) -> None:
    """Raise TypeError or ValueError unless these go together."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
            f"{hint(reduction, REDUCTIONS)}"
        )
    if denominator is not None and reduction == "none":
        raise ValueError("denominator divides a sum: with reduction='none' leave it None")
    if isinstance(denominator, Tensor):
        if denominator.dim() or denominator.dtype == torch.bool:
            raise ValueError(
                "denominator must be a number or a 0-dim tensor of one, got "
                f"{tuple(denominator.shape)} of {denominator.dtype}"
            )
        if not readable(denominator):
            return
    elif denominator is not None and not is_number(denominator):
        raise TypeError(f"denominator must be a number, got {type(denominator).__name__}")
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {float(denominator)}")
