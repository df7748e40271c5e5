# SPDX-License-Identifier: Apache-2.0
"""Which columns of a data set an objective takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...objectives import Objective

# Of token ids, by family: TRL's names.
TOKENS: Mapping[str, tuple[str, ...]] = {
    "pair": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unit": ("prompt_ids", "completion_ids"),
    "list": ("prompt_ids", "completions_ids"),
}
REFERENCE: Mapping[str, tuple[str, ...]] = {
    "pair": ("ref_chosen_logps", "ref_rejected_logps"),
    "unit": ("ref_logps",),
    "list": ("ref_logps",),
}
# Extras that carry another name as a column: one is TRL's, whose batches have another `labels`.
RENAMED: Mapping[str, str] = {"labels": "label"}

# What follows from the tokens and their scores, made by the loss.
_MADE = ("chosen_lengths", "rejected_lengths", "lengths", "chosen_nll", "mask")
# What follows from the policy's distributions, which log-probabilities of targets do not say.
_OF_DISTRIBUTIONS = (
    *("chosen_weights", "rejected_weights", "chosen_kl", "rejected_kl"),
    *("margin_plus", "margin_minus"),
)


@dataclass(frozen=True)
class Columns:
    """By what they hold; extras by the names that the objective has for them."""

    unit: str
    name: str  # of the objective
    reference: tuple[str, ...]  # none where it takes no reference
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    listed: frozenset[str]  # extras of one number a response of a list
    takes_mask: bool  # whether lists may differ in size

    @property
    def tokens(self) -> tuple[str, ...]:
        return TOKENS[self.unit]


def columns_of(objective: Objective) -> Columns:
    """The columns that ``objective`` takes.

    Raises:
        ValueError: it works on sampled tokens, or on more of the policy than the log-probabilities
            of its responses.
    """
    if objective.unit not in TOKENS:
        raise ValueError(
            f"objective must compare whole responses (pairs, lists or single ones), got "
            f"{objective.name}, which works on tokens of sampled responses; train with TRL's "
            "GRPOTrainer and fastpref.integrations.trl"
        )
    extras = {
        name: facts
        for name, facts in objective.extras.items()
        if name not in _MADE and facts.shapes != ("number",)  # which the training keeps
    }
    unknown = [name for name in extras if name in _OF_DISTRIBUTIONS and extras[name].required]
    if unknown:
        raise ValueError(
            f"{objective.name} needs {' and '.join(unknown)}, which follow from the policy's whole "
            "distributions, and a fused head hands over log-probabilities of targets alone; train "
            "with fastpref.preference_loss, which fills them in"
        )
    listed = (name for name, facts in extras.items() if facts.aligned or not facts.shapes)
    return Columns(
        unit=objective.unit,
        name=objective.name,
        reference=REFERENCE[objective.unit] if objective.needs_reference else (),
        needed=tuple(name for name, facts in extras.items() if facts.required),
        optional=tuple(name for name, facts in extras.items() if not facts.required),
        listed=frozenset(listed) if objective.unit == "list" else frozenset(),
        takes_mask="mask" in objective.extras,
    )
