# SPDX-License-Identifier: Apache-2.0
"""Hidden states to the preference loss."""

from ..units import PreferenceOutput
from .api import explain, preference_loss

__all__ = ["PreferenceOutput", "explain", "preference_loss"]
