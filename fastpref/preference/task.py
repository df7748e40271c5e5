# SPDX-License-Identifier: Apache-2.0
"""One call of ``preference_loss``, checked, and what it asks of scoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives import Objective
from ..scoring.request import make_request
from ..units.configuration import configure
from ..units.filling import to_be_filled
from ..units.layouts import Arrangement, arrange
from .arguments import Arguments, check_kinds, check_reference, check_rows
from .batch import Batch
from .comparison import Projection
from .metrics import SCORES

# Extras that take more than log-probs.
WEIGHTS = ("chosen_weights", "rejected_weights")
ENTROPY = ("ref_entropy",)
KL = ("chosen_kl", "rejected_kl")
MARGINS = ("margin_plus", "margin_minus")


@dataclass(frozen=True)
class Task:
    given: Arguments
    objective: Objective
    batch: Batch
    arrangement: Arrangement
    policy: Projection
    reference: Projection | None  # to be scored here

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """As given."""
        return self.given.extras or {}


def make_task(given: Arguments) -> Task:
    """The arguments of ``preference_loss``, checked.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    check_kinds(given)
    objective = configure(given.objective, given.dp_group, given.hyperparameters)
    check_rows(given, objective)
    batch = Batch(given.target, given.ignore_index, given.cu_seqlens, given.seq_group)
    arrangement = arrange(given.layout, given.group_size, batch.rows, objective)
    check_reference(given, objective, batch)
    policy, reference = _policy(given, objective), _reference(given, objective)
    return Task(given, objective, batch, arrangement, policy, reference)


def _policy(given: Arguments, objective: Objective) -> Projection:
    scores = {"logp", *(SCORES[name] for name in given.outputs)}
    if to_be_filled(objective, given.extras or {}, WEIGHTS):
        scores.add("log_sum_sq_probs")
    request, parameters = make_request(
        given.hidden,
        given.weight,
        given.target,
        bias=given.bias,
        lora=given.lora,
        outputs=tuple(sorted(scores)),
        differentiable=("logp",),
        **given.scoring,
    )
    return Projection(request, given.hidden, parameters)


def _reference(given: Arguments, objective: Objective) -> Projection | None:
    if given.ref_hidden is None:
        return None
    weight, bias = given.ref_weight, given.ref_bias
    if weight is None:
        weight, bias = given.weight, given.bias
    entropy = to_be_filled(objective, given.extras or {}, ENTROPY)
    with torch.no_grad():
        request, parameters = make_request(
            given.ref_hidden,
            weight,
            given.target,
            bias=bias,
            lora=given.ref_lora,
            outputs=("entropy", "logp") if entropy else ("logp",),
            prefix="ref_",
            **given.scoring,
        )
    return Projection(request, given.ref_hidden, parameters)
