# SPDX-License-Identifier: Apache-2.0
"""Numbers to the preference loss, whatever they are made of: log-probabilities of responses here,
denoising errors or scores of one's own elsewhere. Knows no head."""

from .layouts import LayoutName, arrange
from .loss import unit_loss
from .numbers import Numbers, TokenNumbers
from .output import PreferenceOutput

__all__ = ["LayoutName", "Numbers", "PreferenceOutput", "TokenNumbers", "arrange", "unit_loss"]
