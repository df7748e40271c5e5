# SPDX-License-Identifier: Apache-2.0
"""Hidden states to per-token log-probabilities."""

from .api import linear_logprob
from .chosen import linear_logits
from .divergence import explain_divergence, linear_divergence
from .head import WeightContext
from .plan import BUDGET_SHARE, PRODUCT_BYTES, Plan
from .sparse import sparse_divergence
from .statistics import TokenScores
from .types import ScoringOptions

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
    "sparse_divergence",
]
