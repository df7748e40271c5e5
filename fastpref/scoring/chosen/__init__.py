# SPDX-License-Identifier: Apache-2.0
"""Logits of chosen ids: rows of the weight are gathered, and no full product is formed."""

from .logits import chosen_logits as chosen_logits
from .logits import linear_logits as linear_logits
