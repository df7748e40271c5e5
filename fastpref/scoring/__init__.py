# SPDX-License-Identifier: Apache-2.0
"""Hidden states to per-token log-probabilities."""

from .api import linear_logprob
from .divergence import linear_divergence
from .schedule import Plan
from .types import ScoringOptions, TokenScores

__all__ = ["Plan", "ScoringOptions", "TokenScores", "linear_divergence", "linear_logprob"]
