# SPDX-License-Identifier: Apache-2.0
"""Which objectives the demo can train with, by fastpref's names, and what they need of the data.

An objective that TRL's DPOTrainer has a loss for trains with that loss, and with fastpref's
hyperparameters; any other one with `fastpref.integrations.trl.FastDPOTrainer`.
"""

from typing import Any

from .. import objectives
from ..integrations.transformers import PreferenceCollator
from ..objectives.checks import hint
from ..objectives.signature import Domain
from . import DemoError

_CONFIG_NAMES = {"beta": "beta", "label_smoothing": "label_smoothing", "tau": "discopop_tau"}
_GIVEN = ("labels", "scores")  # columns that preferences have of themselves


def choices() -> tuple[str, ...]:
    """The names the demo can train with, given a data set with the columns they need."""
    return tuple(name for name in objectives.names() if _refusal(name) is None)


def find(name: str) -> objectives.Objective:
    """The objective called `name`, if the demo can train with it.

    Raises:
        DemoError: with the reason and the valid names.
    """
    known = name in objectives.names()
    reason = _refusal(name) if known else "is not the name of an objective"
    if reason is not None:
        nearest = "" if known else hint(name, choices())
        valid = ", ".join(choices())
        raise DemoError(f"objective {name}: {reason}{nearest or '.'} Choose from {valid}")
    return objectives.get(name)


def columns(*chosen: objectives.Objective) -> dict[str, Domain]:
    """The extras of the objectives that must be columns of the data set, and the numbers allowed
    there.

    Raises:
        ValueError: FastDPOTrainer has not what an objective needs.
    """
    found: dict[str, Domain] = {}
    for objective in chosen:
        for name in PreferenceCollator(objective, pad_token_id=0).columns.needed:
            if name not in _GIVEN:
                found[name] = objective.extras[name].domain or found.get(name, Domain())
    return found


def _refusal(name: str) -> str | None:
    """Why the demo cannot train with the objective, or None if it can."""
    try:
        objective = objectives.get(name)
        if objective.unit == "token":
            return "needs sampled completions with advantages, not preferences"
        extras = {extra: objective.extras[extra] for extra in columns(objective)}
    except (TypeError, ValueError) as error:
        return str(error).removeprefix(f"{name} ")
    filled = [extra for extra, facts in extras.items() if facts.filled]
    other = [extra for extra, facts in extras.items() if not facts.aligned]
    if filled:
        return f"needs {', '.join(filled)}, which only fastpref.preference_loss fills in"
    if other or (extras and objective.unit != "pair"):
        return f"needs {', '.join(other or extras)}, which preference data does not have"
    return None


def trainer_name(objective: objectives.Objective) -> str:
    """What the demo trains with."""
    fast = "fastpref.integrations.trl.FastDPOTrainer"
    return "trl.DPOTrainer" if config_arguments(objective) else fast


def for_both_heads(objective: objectives.Objective) -> objectives.Objective:
    """What TRL's head is compared with fastpref's under: the objective, if TRL's DPOTrainer has a
    loss for it, else DPO."""
    return objective if config_arguments(objective) else objectives.get("dpo")


def config_arguments(objective: objectives.Objective) -> dict[str, Any]:
    """The arguments of DPOConfig that make the loss of TRL's DPOTrainer the objective; none where
    it has no such loss."""
    registration = objective.registration
    if objective.unit != "pair" or registration is None or registration.loss_type is None:
        return {}
    settings = objective.hyperparameters
    renamed = {_CONFIG_NAMES[name]: settings[name] for name in _CONFIG_NAMES if name in settings}
    return {"loss_type": [registration.loss_type], **renamed}
