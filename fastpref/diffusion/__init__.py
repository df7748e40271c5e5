# SPDX-License-Identifier: Apache-2.0
"""Preference losses of diffusion and flow models: squared errors of denoising to log-ratios, on
which the same objectives work as on log-probabilities of text."""

from .loss import preference_loss
from .methods import (
    clipped_step_dpo,
    diffusion_orpo,
    dspo,
    mapo,
    negative_aware,
    smoothed_preference_scale,
)
from .presets import Preset, preset, presets
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
    "Preset",
    "clipped_step_dpo",
    "convert",
    "diffusion_orpo",
    "dspo",
    "error_weight",
    "k_prediction",
    "log_ratio",
    "mapo",
    "negative_aware",
    "preference_loss",
    "preset",
    "presets",
    "smoothed_preference_scale",
    "step_log_prob",
    "step_log_ratio",
    "velocity",
]
