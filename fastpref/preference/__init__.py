# SPDX-License-Identifier: Apache-2.0
"""Hidden states to the preference loss."""

from .api import explain, preference_loss
from .output import PreferenceOutput

__all__ = ["PreferenceOutput", "explain", "preference_loss"]
