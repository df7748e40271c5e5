# SPDX-License-Identifier: Apache-2.0
"""Which pairs to train on, in which order and at which weight. Tensors in, tensors out, before or
between trainings; each function names its paper, and what of it it is."""

from .difficulty import margin_weights, vote_difficulty
from .minimax import MinimaxPairs, minimax_pairs
from .mixtures import MixtureWeights, mixture_weights
from .pairs import RankedPairs, clear_margin, ranked_pairs, top_fraction
from .ridge import ridge_difficulty
from .separability import SeparabilityReport, separability
from .singular import singular_kernel_scores
from .stages import StageSampler
from .trees import StepPairs, step_rewards, tree_steps

__all__ = [
    "MinimaxPairs",
    "MixtureWeights",
    "RankedPairs",
    "SeparabilityReport",
    "StageSampler",
    "StepPairs",
    "clear_margin",
    "margin_weights",
    "minimax_pairs",
    "mixture_weights",
    "ranked_pairs",
    "ridge_difficulty",
    "separability",
    "singular_kernel_scores",
    "step_rewards",
    "top_fraction",
    "tree_steps",
    "vote_difficulty",
]
