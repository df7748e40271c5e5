# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a sampler's steps, which are draws from normal distributions."""

from __future__ import annotations

import math

from torch import Tensor

from .checks import Reduction, check_per_sample, check_predictions, check_reduction
from .errors import squared_error, squared_errors


def step_log_prob(
    sample: Tensor, mean: Tensor, *, std: float | Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Log of the normal density of each step, constants included:

        R[-(sample - mean)^2 / (2 std^2) - log std - log(2 pi) / 2]

    What DDPO (arXiv:2305.13301), D3PO (2311.13231) and Flow-GRPO (2505.05470) take is R = the mean
    over elements, and that is why their clip ranges are tiny: with the sum they mean other things.

    Args:
        sample: (B, ...), what was drawn; gets no gradient.
        mean: like it, of the model; dtypes as in ``log_ratio``.
        std: a positive number or (B,); gets no gradient.
        reduction: "mean" or "sum" over all dimensions but the first, R.

    Returns:
        (B,), float64 where ``sample`` or ``mean`` is and float32 otherwise. Differentiable with
        respect to ``mean``.

    Raises:
        TypeError, ValueError: naming the argument that is wrong. Values of ``std`` are looked at on
            the CPU only.
    """
    check_predictions(sample=sample, mean=mean)
    check_reduction(reduction)
    check_per_sample("std", std, sample, zero=False)
    error = squared_error(mean, sample, reduction=reduction)
    count = math.prod(sample.shape[1:]) if reduction == "sum" else 1
    log_2_pi = math.log(2 * math.pi)
    if isinstance(std, Tensor):
        std = std.detach().to(error.dtype)
        return error * (-0.5 / std.square()) - count * (std.log() + log_2_pi / 2)
    return error * (-0.5 / std**2) - count * (math.log(std) + log_2_pi / 2)


def step_log_ratio(
    sample: Tensor,
    mean: Tensor,
    ref_mean: Tensor,
    *,
    std: float | Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    """``step_log_prob`` of the model less that of the reference, computed without cancellation:

        -R[d (d + 2 (ref_mean - sample))] / (2 std^2),   d = mean - ref_mean

    Args:
        sample, mean, std, reduction: as in ``step_log_prob``.
        ref_mean: like ``mean``, of the reference; gets no gradient.

    Returns:
        (B,), float64 where a tensor but ``std`` is and float32 otherwise. Differentiable with
        respect to ``mean``.

    Raises:
        TypeError, ValueError: as ``step_log_prob``.
    """
    check_predictions(sample=sample, mean=mean, ref_mean=ref_mean)
    check_reduction(reduction)
    check_per_sample("std", std, sample, zero=False)
    gap = squared_errors(mean, ref_mean, sample, reduction=reduction).gap
    if isinstance(std, Tensor):
        std = std.detach().to(gap.dtype)
    return gap * (-0.5 / std**2)
