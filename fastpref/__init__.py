# SPDX-License-Identifier: Apache-2.0
"""Fused preference losses: hidden states to log-probabilities to losses, in bounded memory."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from . import curriculum, diagnostics, diffusion, optim, reference
    from .integrations.causal_lm import fuse_lm_head, unfuse_lm_head

__version__ = "0.1.0"
__all__ = [
    "PreferenceOutput",
    "ScoringOptions",
    "TokenScores",
    "__version__",
    "curriculum",
    "diagnostics",
    "diffusion",
    "explain",
    "explain_divergence",
    "fuse_lm_head",
    "linear_divergence",
    "linear_logits",
    "linear_logprob",
    "nn",
    "objectives",
    "optim",
    "preference_loss",
    "reference",
    "release_workspace",
    "sequence_logp",
    "sparse_divergence",
    "unfuse_lm_head",
]


def __getattr__(name: str) -> Any:
    # What a plain call of the package does not need.
    if name in ("fuse_lm_head", "unfuse_lm_head"):
        from .integrations import causal_lm

        return getattr(causal_lm, name)
    if name in ("curriculum", "diagnostics", "diffusion", "optim", "reference"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_extension.load()
