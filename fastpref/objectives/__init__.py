# SPDX-License-Identifier: Apache-2.0
"""Preference objectives: pure functions from log-probabilities to losses.

    losses, chosen_rewards, rejected_rewards = dpo(policy_chosen_logps, policy_rejected_logps,
                                                   ref_chosen_logps, ref_rejected_logps, beta=0.1)

``losses.mean()`` is the published loss; rewards are detached. Losses and gradients are finite for
log-probabilities from -1e4 to 0. ``get("dpo", beta=0.1)`` is the same as a frozen value that an
engine can run; ``Objective(function, unit=..., scope=...)`` makes one of your own function.
"""

from .reference_based import dpo, hinge, ipo
from .reference_free import sft, simpo
from .registry import Objective, as_objective, get, names
from .results import ListLosses, PairLosses, TokenLosses, UnitLosses

__all__ = [
    "ListLosses",
    "Objective",
    "PairLosses",
    "TokenLosses",
    "UnitLosses",
    "as_objective",
    "dpo",
    "get",
    "hinge",
    "ipo",
    "names",
    "sft",
    "simpo",
]
