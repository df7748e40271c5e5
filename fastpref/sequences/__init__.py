# SPDX-License-Identifier: Apache-2.0
"""Per token to per sequence: the sums, and the weights that tokens have in them."""

from .sums import sequence_logp
from .token_weights import (
    decay_weights,
    divergence_mask,
    length_desensitized_weights,
    sampled_weights,
    step_weights,
    token_credit,
    turn_mask,
)

__all__ = [
    "decay_weights",
    "divergence_mask",
    "length_desensitized_weights",
    "sampled_weights",
    "sequence_logp",
    "step_weights",
    "token_credit",
    "turn_mask",
]
