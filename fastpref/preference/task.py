# SPDX-License-Identifier: Apache-2.0
"""One call of ``preference_loss``, checked, and what it asks of scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives import Objective
from ..scoring.agreement import Own, agree, compare, refused_together
from ..scoring.api import MOST_PLANS, MOST_SIGNATURES, Asked, ask
from ..scoring.head import Form, Head, Model
from ..scoring.request import make_request
from ..scoring.rules.compared import WithDivergence, WithMixture
from ..scoring.rules.scores import Scores
from ..scoring.signature import Kept, signature_of
from ..units.configuration import configure, traced_units
from ..units.filling import to_be_filled
from ..units.layouts import Arrangement, arrange
from .arguments import (
    Arguments,
    check_hyperparameters,
    check_kinds,
    check_reference,
    check_rows,
    extras_of_tokens,
    flattened,
)
from .batch import Batch
from .metrics import SCORES
from .pairs import PairCall, pair_call_of

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
    main: Asked  # of the policy, or of both models where they are looked at side by side
    reference: Asked | None  # to be scored before
    extras_of_tokens: tuple[str, ...]  # by name, those whose rows lie on the ranks of seq_group
    pairs: PairCall | None = None  # where one operator may take scores to the loss

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """As given, and traced hyperparameters of one value a unit."""
        units = traced_units(self.given.hyperparameters)
        return {**(self.given.extras or {}), **units}

    @property
    def vocabulary_size(self) -> int:
        """Of all ranks together."""
        head = self.main.models[0].head
        group, own = head.form.group, Own(head.columns, head.form.start)
        if group is None:
            return head.columns
        return agree(group, head.weight, own, {"taken of it": "vocabulary size"}).shard.total


def make_task(given: Arguments) -> Task:
    """The arguments of ``preference_loss``, checked.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    with (
        refused_together(given.dp_group, "dp_group"),
        refused_together(given.seq_group, "seq_group"),
        refused_together(given.tp_group),
    ):
        return _made(given)


def compare_ranks(task: Task) -> None:
    """Raise on every rank where those of ``seq_group`` or ``dp_group`` make different calls."""
    given, device = task.given, task.batch.target.device
    if given.dp_group is None and given.seq_group is None:
        return
    common: dict[str, object] = {
        "objective": task.objective.name,
        "reduction": given.reduction,
    }
    compare(given.dp_group, "dp_group", common, {}, device)
    common |= {
        "layout": given.layout if isinstance(given.layout, str) else "indices",
        "outputs": tuple(given.outputs),
        "cu_seqlens": given.cu_seqlens is not None,
        "ref_logps and ref_hidden": (given.ref_logps is not None, given.ref_hidden is not None),
        "token_weights": given.token_weights is not None,
        "extras": tuple(sorted((name, one.dtype) for name, one in (given.extras or {}).items())),
        "dtype": task.main.request.dtype,
    }
    compare(given.seq_group, "seq_group", common, {"rows": task.batch.rows}, device)


def _made(given: Arguments) -> Task:
    signature = _signature(given)
    if signature is None:
        return _checked(given)
    return _KEPT.of(signature, lambda: _Known.of(_checked(given))).task(given)


# Their checks read what the tensors hold, or they are kept.
_READ = ("cu_seqlens", "layout", "denominator", "temperature")


def _signature(given: Arguments) -> tuple[Any, ...] | None:
    """As ``signature_of``, of all arguments; None too where more decides whether they are taken."""
    arguments = dict(vars(given))
    objective, extras = arguments.pop("objective"), arguments.pop("extras")
    hyperparameters = arguments.pop("hyperparameters")
    if any(isinstance(arguments[name], Tensor) for name in _READ):
        return None
    if isinstance(objective, Objective):
        if objective.registration is None:
            return None
        # By what is in it: a function of one's own would be kept with all that it holds.
        arguments["family"] = objective.unit, objective.scope, objective.needs_reference
        hyperparameters = dict(objective.settings) | hyperparameters
        objective = objective.name
    for name, value in hyperparameters.items():
        if isinstance(value, Tensor):
            return None
        arguments[f"{name}="] = value
    if extras is not None:
        if not isinstance(extras, Mapping):
            return None
        for name, value in extras.items():
            arguments[f"extras {name!r}"] = value
    return signature_of({"objective": objective, **arguments})


class _Known(NamedTuple):
    """What follows from a call's signature: a task without its tensors."""

    objective: Objective
    arrangement: Arrangement
    main: Asked
    reference: Asked | None
    form: Form  # of both heads
    pairs: PairCall | None

    @classmethod
    def of(cls, task: Task) -> _Known:
        main, reference = task.main, task.reference
        return cls(
            task.objective,
            task.arrangement,
            main._replace(models=[], plans=main.plans or Kept(MOST_PLANS)),
            None if reference is None else reference._replace(models=[]),
            main.models[0].head.form,
            pair_call_of(task.given, task.objective, task.arrangement),
        )

    def task(self, given: Arguments) -> Task:
        main, reference = [_model(given.hidden, given.weight, given.bias, self.form)], None
        if given.ref_hidden is not None:
            theirs = _model(given.ref_hidden, *_reference_head(given), self.form)
            if self.reference is None:
                main.append(theirs.detached())
            else:
                reference = self.reference._replace(models=[theirs])
        asked = self.main._replace(models=main)
        batch, arrangement = _batch(given), self.arrangement
        return Task(given, self.objective, batch, arrangement, asked, reference, (), self.pairs)


def _model(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Model:
    return Model(hidden, Head(weight, bias, None, None, form))


_KEPT: Kept[_Known] = Kept(MOST_SIGNATURES)


def _checked(given: Arguments) -> Task:
    check_kinds(given)
    check_hyperparameters(given)
    given = flattened(given)
    objective = configure(given.objective, given.dp_group, given.hyperparameters)
    check_rows(given, objective)
    batch = _batch(given)
    arrangement = arrange(given.layout, given.group_size, batch.rows, objective)
    of_tokens = extras_of_tokens(given, objective)
    check_reference(given, objective, batch)
    filled = to_be_filled(objective, given.extras)
    main, reference = _policy(given, filled), _reference(given, filled)
    if reference is not None:
        beside = _compared(main, reference, objective, filled)
        main, reference = (main, reference) if beside is None else (beside, None)
    return Task(given, objective, batch, arrangement, main, reference, of_tokens)


def _batch(given: Arguments) -> Batch:
    return Batch(
        given.target, given.ignore_index, given.cu_seqlens, given.seq_group, given.token_weights
    )


def _policy(given: Arguments, filled: Sequence[str]) -> Asked:
    scores = {"logp", *(SCORES[name] for name in given.outputs)}
    if any(name in filled for name in WEIGHTS):
        scores.add("log_sum_sq_probs")
    return ask(
        given.hidden,
        given.weight,
        given.target,
        bias=given.bias,
        lora=given.lora,
        weight_grad_basis=given.weight_grad_basis,
        outputs=tuple(sorted(scores)),
        differentiable=("logp",),
        **given.scoring,
    )


def _reference(given: Arguments, filled: Sequence[str]) -> Asked | None:
    if given.ref_hidden is None:
        return None
    weight, bias = _reference_head(given)
    entropy = any(name in filled for name in ENTROPY)
    with torch.no_grad():
        return ask(
            given.ref_hidden,
            weight,
            given.target,
            bias=bias,
            lora=given.ref_lora,
            outputs=("entropy", "logp") if entropy else ("logp",),
            prefix="ref_",
            **given.scoring,
        )


def _reference_head(given: Arguments) -> tuple[Tensor, Tensor | None]:
    if given.ref_weight is None:
        return given.weight, given.bias
    return given.ref_weight, given.ref_bias


def _compared(
    policy: Asked, reference: Asked, objective: Objective, filled: Sequence[str]
) -> Asked | None:
    """Both models side by side, where the objective takes what is made of whole distributions."""
    kl, margins = ([name for name in names if name in filled] for names in (KL, MARGINS))
    if not kl and not margins:
        return None
    ours, theirs = policy.rule, reference.rule
    if not isinstance(ours, Scores) or not isinstance(theirs, Scores):
        raise TypeError("both are scored")
    epsilon: float | None = objective.hyperparameters.get("epsilon") if margins else None
    if margins and epsilon is None:
        raise ValueError(
            f"{objective.name} takes {' and '.join(margins)}, which are made with a hyperparameter "
            f"'epsilon', and has none; give it one, or pass extras={{{margins[0]!r}: ...}}"
        )
    rule: WithDivergence | WithMixture = WithDivergence(ours, theirs, epsilon)
    if not kl and epsilon is not None:
        rule = WithMixture(ours, theirs, epsilon)
    models = [policy.models[0], reference.models[0].detached()]
    asked = policy.request
    request = make_request(models, ignore_index=asked.ignore_index, options=asked.options)
    return Asked(request, rule, models, policy.temperature)
