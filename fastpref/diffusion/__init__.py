# SPDX-License-Identifier: Apache-2.0
"""Preference losses of diffusion and flow models: squared errors of denoising to log-ratios, on
which the same objectives work as on log-probabilities of text."""

from .ratio import log_ratio
from .steps import step_log_prob, step_log_ratio
from .targets import (
    DATA,
    FLOW,
    NOISE,
    PredictionTarget,
    convert,
    error_weight,
    k_prediction,
    velocity,
)

__all__ = [
    "DATA",
    "FLOW",
    "NOISE",
    "PredictionTarget",
    "convert",
    "error_weight",
    "k_prediction",
    "log_ratio",
    "step_log_prob",
    "step_log_ratio",
    "velocity",
]
