# SPDX-License-Identifier: Apache-2.0
"""Hidden states to per-token log-probabilities."""

from .api import linear_logprob
from .schedule import Plan
from .types import ScoringOptions, TokenScores

__all__ = ["Plan", "ScoringOptions", "TokenScores", "linear_logprob"]
