# SPDX-License-Identifier: Apache-2.0
"""One call from predictions to the preference loss, under any objective of the catalogue: its
log-probabilities are the log-ratios of denoising errors, those of the reference 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Objective
from ..objectives.checks import check_group
from ..units import Numbers, PreferenceOutput, arrange, unit_loss
from ..units.configuration import configure, traced_units
from ..units.filling import check_extras
from ..units.layouts import LayoutName
from ..units.loss import check_reduction as check_denominator
from ..units.numbers import mean
from .checks import Reduction
from .errors import element_counts
from .ratio import compared


def preference_loss(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    objective: str | Objective | Callable[..., Any],
    *,
    layout: LayoutName | Tensor = "halves",
    group_size: int | None = None,
    weight: float | Tensor = 1.0,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    denominator: float | Tensor | None = None,
    dp_group: dist.ProcessGroup | None = None,
    **hyperparameters: Any,
) -> PreferenceOutput:
    """The preference loss of a batch of samples, from what a model and its reference predict.

    Args:
        model_pred, ref_pred, target, weight, reduction, mask: as in ``log_ratio``, whose z the
            objective takes for the policy's log-probabilities, with 0 for the reference's.
            ``reduction`` is of a sample's elements; losses are averaged, unless there is a
            ``denominator``.
        objective: the name of one, an ``Objective``, or a pairwise function.
        layout: which rows are compared: "halves" (chosen samples first, as diffusers has them),
            "interleaved", "groups", "units", or an index tensor (P, 2) of rows, chosen first.
            Objectives of single samples take each row by itself.
        group_size: K, with layout="groups"; 2 at least.
        extras: what else the objective takes, by name: ``labels`` (B,), ``scores`` (G, K).
        denominator: what the sum of the losses is divided by instead of their number, for
            accumulation over several batches.
        dp_group: process group of batch-wide statistics, as the mean log-ratio of ``kto``. Every
            rank makes the call, and runs backward.
        hyperparameters: of the objective; those that are numbers may be one value a unit, (P,),
            (B,) or (G,).

    Returns:
        PreferenceOutput, ``logps`` being z and ``ref_logps`` zeros (None of an objective without a
        reference); float32, float64 where a prediction is. ``metrics`` has the objective's own
        and ``loss/model`` and ``loss/reference``, the mean squared errors of the two, which cost no
        pass over the predictions. Gradients go to ``model_pred``, ``weight`` and hyperparameters.

    Raises:
        TypeError, ValueError: naming the argument, what came, what was expected, and the remedy;
            also where the objective needs lengths or tokens, which predictions have not.
    """
    check_extras(extras)
    check_group(dp_group, "dp_group")
    check_denominator("mean", denominator)
    configured = configure(objective, dp_group, hyperparameters)
    given = {**(extras or {}), **traced_units(hyperparameters)}
    _check_compared(configured, given, group_size)
    found = compared(model_pred, ref_pred, target, weight, reduction, mask)
    arrangement = arrange(layout, group_size, model_pred.shape[0], configured)
    ratios = found.log_ratio
    numbers = Numbers(
        logps=ratios,
        ref_logps=torch.zeros_like(ratios) if configured.needs_reference else None,
    )
    output = unit_loss(configured, numbers, arrangement, extras=given, denominator=denominator)
    errors = {"loss/model": found.model_error.detach(), "loss/reference": found.ref_error}
    if reduction == "sum":
        counts = element_counts(mask, model_pred)
        errors = {name: total / counts for name, total in errors.items()}
    return output._replace(
        metrics=output.metrics | {name: mean(error) for name, error in errors.items()}
    )


def _check_compared(
    objective: Objective, extras: Mapping[str, Tensor], group_size: int | None
) -> None:
    """Raise ValueError where the objective is of text alone, or has nothing to compare."""
    if objective.unit == "token":
        raise ValueError(
            f"{objective.name} works on tokens, and a prediction has none; what has them is a "
            "sampler, in its steps: give step_log_prob of each as a token of the objective"
        )
    means = objective.reduction == "mean"
    lacking = [
        name
        for name, facts in objective.extras.items()
        if facts.filled and name not in extras and (facts.required or means)
    ]
    if lacking:
        remedy = "take an objective of sums, as dpo"
        if "normalize" in objective.signature.hyperparameters:
            remedy = "pass normalize='sum'"
        raise ValueError(
            f"{objective.name} needs {' and '.join(lacking)}, which are made of tokens, and a "
            f"prediction has none; {remedy}"
        )
    if objective.unit == "list" and group_size == 1:
        raise ValueError(
            f"group_size must be at least 2, got 1: {objective.name} compares the samples of a list"
        )
