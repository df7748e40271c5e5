# SPDX-License-Identifier: Apache-2.0
"""Denoising errors of a model and its reference to log-ratios."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .checks import Reduction, check_mask, check_per_sample, check_predictions, check_reduction
from .errors import squared_errors


class Compared(NamedTuple):
    """Of B samples, (B,) each, float32 or float64."""

    log_ratio: Tensor  # differentiable
    model_error: Tensor  # squared error; differentiable
    ref_error: Tensor  # squared error; a constant


def log_ratio(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: float | Tensor = 1.0,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """How much likelier the model finds each sample than its reference does, by their denoising
    errors: the log-ratio of policy and reference in the bound on a diffusion model's likelihood
    (Diffusion-DPO, Wallace et al. 2023, arXiv:2311.12908).

        z = weight (R[(ref - target)^2] - R[(model - target)^2])
          = -weight R[d (d + 2 (ref - target))],   d = model - ref

    Computed in the second form, which loses no digits where the two agree; R is the mean or the sum
    over all dimensions but the first.

    Args:
        model_pred: (B, ...), of the model that trains; any further dimensions and dense strides.
        ref_pred: like it, of the reference; gets no gradient.
        target: like it: noise, data, velocity, or what else the two predict; gets no gradient.
            These three are float16, bfloat16, float32 or float64, of one dtype or several.
        weight: a number or (B,), not negative; what a method's beta and a timestep's weight come
            to.
        reduction: "mean" or "sum", R.
        mask: broadcastable to the predictions, 0 = left out, and whatever lies there is not read.
            With "mean" R divides by what is left in; a sample with nothing left in gives 0.

    Returns:
        (B,), float64 where a prediction is and float32 otherwise. Arithmetic is in that dtype.
        Gradients go to ``model_pred`` and ``weight``: dz/dmodel = -2 weight (model - target), over
        R's count for a mean.

    Raises:
        TypeError, ValueError: naming the argument that is wrong. Values of ``weight`` are looked at
            on the CPU only.
    """
    return compared(model_pred, ref_pred, target, weight, reduction, mask).log_ratio


def compared(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: float | Tensor,
    reduction: Reduction,
    mask: Tensor | None,
) -> Compared:
    """``log_ratio``, and the squared errors that it is made of, which cost no pass of their own."""
    check_predictions(model_pred=model_pred, ref_pred=ref_pred, target=target)
    check_reduction(reduction)
    check_mask(mask, model_pred)
    check_per_sample("weight", weight, model_pred, zero=True)
    errors = squared_errors(model_pred, ref_pred, target, reduction=reduction, mask=mask)
    scale = -weight.to(errors.gap.dtype) if isinstance(weight, Tensor) else -float(weight)
    return Compared(errors.gap * scale, errors.model, errors.reference)
