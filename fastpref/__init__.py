# SPDX-License-Identifier: Apache-2.0
"""Fused preference losses: hidden states to log-probabilities to losses, without the logits."""

from . import _extension, nn, objectives
from .preference import PreferenceOutput, explain, preference_loss
from .scoring import (
    ScoringOptions,
    TokenScores,
    explain_divergence,
    linear_divergence,
    linear_logits,
    linear_logprob,
    release_workspace,
    sparse_divergence,
)
from .sequences import sequence_logp

__version__ = "0.1.0"
__all__ = [
    "PreferenceOutput",
    "ScoringOptions",
    "TokenScores",
    "__version__",
    "explain",
    "explain_divergence",
    "linear_divergence",
    "linear_logits",
    "linear_logprob",
    "nn",
    "objectives",
    "preference_loss",
    "release_workspace",
    "sequence_logp",
    "sparse_divergence",
]

_extension.load()
