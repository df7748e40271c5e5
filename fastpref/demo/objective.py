# SPDX-License-Identifier: Apache-2.0
"""Which objectives the demo can train with, by fastpref's names, and what they need of the data.

A name that TRL has a loss type for runs as TRL's own loss, with fastpref's hyperparameters; the
others run as fastpref's (`trainer.PairTrainer`, `trainer.ListTrainer`).
"""

from collections.abc import Mapping
from typing import Any

from .. import objectives
from ..objectives.signature import Domain
from . import DemoError

_CONFIG_NAMES = {"beta": "beta", "label_smoothing": "label_smoothing", "tau": "discopop_tau"}
# What a batch gives of itself, by family.
_GIVEN: Mapping[str, tuple[str, ...]] = {
    "pair": ("chosen_lengths", "rejected_lengths"),
    "unit": ("lengths", "labels"),
    "list": ("lengths", "mask", "scores"),
    "token": (),
}


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
        raise DemoError(f"objective {name}: {reason}; choose from {', '.join(choices())}")
    return objectives.get(name)


def columns(*chosen: objectives.Objective) -> dict[str, Domain]:
    """The extras of the objectives that must be columns of the data set, and the numbers allowed
    there."""
    found: dict[str, Domain] = {}
    for objective in chosen:
        for name, facts in objective.extras.items():
            if facts.required and name not in _GIVEN[objective.unit]:
                found[name] = facts.domain or found.get(name, Domain())
    return found


def _refusal(name: str) -> str | None:
    """Why the demo cannot train with the objective, or None if it can."""
    try:
        objective = objectives.get(name)
    except TypeError as error:
        return str(error).removeprefix(f"{name} ")
    if objective.unit == "token":
        return "needs sampled completions with advantages, not preferences"
    extras = {extra: objective.extras[extra] for extra in columns(objective)}
    filled = [extra for extra, facts in extras.items() if facts.filled]
    state = [extra for extra, facts in extras.items() if facts.shapes == ("number",)]
    other = [extra for extra, facts in extras.items() if not facts.aligned]
    if filled:
        return f"needs {', '.join(filled)}, which only fastpref.preference_loss fills in"
    if state:
        return f"needs {', '.join(state)}, state of a training, which the demo does not keep"
    if other or (extras and objective.unit != "pair"):
        return f"needs {', '.join(other or extras)}, which preference data does not have"
    return None


def config_arguments(objective: objectives.Objective) -> dict[str, Any]:
    """The arguments of DPOConfig that make TRL's loss the objective; none where TRL has no such
    loss."""
    registration = objective.registration
    if objective.unit != "pair" or registration is None or registration.loss_type is None:
        return {}
    settings = objective.hyperparameters
    renamed = {_CONFIG_NAMES[name]: settings[name] for name in _CONFIG_NAMES if name in settings}
    return {"loss_type": [registration.loss_type], **renamed}
