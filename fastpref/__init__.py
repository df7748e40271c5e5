# SPDX-License-Identifier: Apache-2.0
"""Fused preference losses: hidden states to log-probabilities to losses, in bounded memory."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import curriculum, diagnostics, diffusion, nn, objectives, optim, reference
    from .integrations.causal_lm import fuse_lm_head, unfuse_lm_head
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

_FROM = {
    "preference": ("PreferenceOutput", "explain", "preference_loss"),
    "scoring": (
        "ScoringOptions",
        "TokenScores",
        "explain_divergence",
        "linear_divergence",
        "linear_logits",
        "linear_logprob",
        "release_workspace",
        "sparse_divergence",
    ),
    "sequences": ("sequence_logp",),
    "integrations.causal_lm": ("fuse_lm_head", "unfuse_lm_head"),
}
_PLACES = {name: place for place, names in _FROM.items() for name in names}
_PACKAGES = (
    "curriculum",
    "diagnostics",
    "diffusion",
    "nn",
    "objectives",
    "optim",
    "preference",
    "reference",
    "scoring",
    "sequences",
)


# When it is first asked for: torch takes a second to import, within which the command line must
# hear what interrupts it, and which what needs no tensors need not wait for.
def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
