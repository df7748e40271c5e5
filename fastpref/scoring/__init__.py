# SPDX-License-Identifier: Apache-2.0
"""Hidden states to per-token log-probabilities."""

from .api import linear_logprob
from .chosen import linear_logits
from .divergence import explain_divergence, linear_divergence
from .head import WeightContext
from .plan import BUDGET_SHARE, Plan
from .products import PRODUCT_BYTES
from .sparse import sparse_divergence
from .statistics import TokenScores
from .types import ScoringOptions
from .workspace import release_workspace

__all__ = [
    "BUDGET_SHARE",
    "PRODUCT_BYTES",
    "Plan",
    "ScoringOptions",
    "TokenScores",
    "WeightContext",
    "explain_divergence",
    "linear_divergence",
    "linear_logits",
    "linear_logprob",
    "release_workspace",
    "sparse_divergence",
]
