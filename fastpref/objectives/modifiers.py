# SPDX-License-Identifier: Apache-2.0
"""Objectives made of others: one with weighted pairs, or a weighted sum of several.

Both return an ``Objective``, which runs, compares, copies and pickles like any other. It takes the
extras of all its parts. Its hyperparameters are those on which all parts that have them agree:
``replace`` sets them in each of these parts. Others are set in the parts beforehand.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from .checks import as_python
from .registry import SCOPES, Composite, Objective, Reduction, Scope, as_objective
from .results import Losses
from .signature import POLICY_LOGPS, Domain, ExtraFacts, Hyperparameter, Signature

# What ``as_objective`` takes.
Part: TypeAlias = str | Objective | Callable[..., Any]

_WEIGHTS = {
    name: ExtraFacts(shapes=("logps",), filled=True)
    for name in ("chosen_weights", "rejected_weights")
}
_WEIGHT = Hyperparameter(None, Domain(low=0.0))


def wpo(objective: Part, *, clamp: bool = True) -> Objective:
    """Weighted preference optimization: pairs count as likely as the policy is to write them.

        loss = min(1, w_w w_l) times the loss of ``objective``
        w = exp(mean_t (log p_t(y_t) - log sum_v p_t(v)^2)), of each response, without gradient

    Zhou et al. 2024, arXiv:2406.11827, eq. 2. The clamp at 1 is in the authors' code and not in
    TRL's: ``clamp=False``. Rewards are those of ``objective``.

    Args:
        objective: pairwise: a name, an ``Objective`` or a function.
        clamp: whether the product of the weights ends at 1.

    Returns:
        An ``Objective`` with the extras ``chosen_weights`` and ``rejected_weights``, each ``(P,)``,
        beside those of ``objective``.

    Raises:
        TypeError, ValueError: on an objective that is not pairwise, or whose losses belong to no
            pair because they are sorted or those of the whole batch.
    """
    part = as_objective(objective)
    if not isinstance(clamp, bool):
        raise TypeError(f"clamp must be a bool, got {type(clamp).__name__}")
    if part.unit != "pair":
        raise ValueError(f"wpo weighs pairs, but {part.name} has unit {part.unit!r}")
    for inner in _parts(part):
        if inner.registration is not None and not inner.registration.loss_per_unit:
            raise ValueError(
                f"wpo weighs pairs, but the losses of {inner.name} are sorted or those of a batch"
            )
    return _Weighted((part,), clamp).as_objective(at_least="pair")


def combine(objectives: Sequence[Part], weights: Sequence[float]) -> Objective:
    """A weighted sum of objectives on the same log-probabilities.

        loss = sum_i weights_i loss_i

    Mixed preference optimization (MPO) of InternVL, Wang et al. 2024, arXiv:2411.10442, is
    ``combine(["dpo", "bco_pair", "sft"], [0.8, 0.2, 1.0])``. The rewards, and for tokens ratio,
    clipping and divergence, are those of the first objective: a sum of several scales would mean
    nothing, so the one to watch comes first.

    Args:
        objectives: names, ``Objective`` values or functions, all with the same unit.
        weights: as many numbers > 0.

    Returns:
        An ``Objective`` that needs a reference if one of them does; its scope is the widest.

    Raises:
        TypeError, ValueError: on nothing to combine, unequal units, or wrong weights.
    """
    for name, value in (("objectives", objectives), ("weights", weights)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    parts = tuple(as_objective(objective) for objective in objectives)
    if not parts or len(parts) != len(weights):
        raise ValueError(
            "combine needs objectives and one weight for each, got "
            f"{len(parts)} objectives and {len(weights)} weights"
        )
    for part, weight in zip(parts, weights, strict=True):
        _WEIGHT.check(f"weights: that of {part.name}", weight)
    if len({part.unit for part in parts}) > 1:
        units = ", ".join(f"{part.name} {part.unit!r}" for part in parts)
        raise ValueError(f"objectives must have the same unit, got {units}")
    return _Combined(parts, tuple(map(as_python, weights))).as_objective()


@dataclass(frozen=True)
class Modifier(Composite):
    """Base of the modifiers, applied to objectives: their signatures together, their results."""

    objectives: tuple[Objective, ...]
    signature: Signature = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", _union(self.objectives, self.own_extras()))

    def own_extras(self) -> Mapping[str, ExtraFacts]:
        """What it takes beside theirs."""
        return {}

    def as_objective(self, at_least: Scope = "unit") -> Objective:
        """Its scope is the widest of its objectives; it needs a reference if one of them does."""
        scopes = [at_least, *(part.scope for part in self.objectives)]
        return Objective(
            self,
            unit=self.objectives[0].unit,
            scope=max(scopes, key=SCOPES.index),
            needs_reference=any(part.needs_reference for part in self.objectives),
        )

    @property
    def reduction(self) -> Reduction:
        """That of the first part, whose rewards are shown."""
        return self.objectives[0].reduction

    @property
    def fixed_direction(self) -> bool:
        return False

    def replace(self, **hyperparameters: Any) -> "Modifier":
        parts = []
        for part in self.objectives:
            known = part.signature.hyperparameters
            own = {name: value for name, value in hyperparameters.items() if name in known}
            parts.append(part.replace(**own))
        return dataclasses.replace(self, objectives=tuple(parts))

    def results(self, logps: tuple[Tensor | None, ...], keywords: Mapping[str, Any]) -> list[Any]:
        """Of each objective, on the log-probabilities and extras it takes."""
        names = self.signature.logps
        given = dict(zip(names, logps, strict=False)) | dict(keywords)
        ordered = [given.get(name) for name in names]
        results = []
        for part in self.objectives:
            has_others = part.needs_reference or part.unit == "token"
            count = len(part.signature.logps) if has_others else POLICY_LOGPS[part.unit]
            taken = {*part.extras, *part.signature.hyperparameters}
            extras = {name: value for name, value in keywords.items() if name in taken}
            results.append(part(*ordered[:count], **extras))
        return results


@dataclass(frozen=True)
class _Weighted(Modifier):
    clamp: bool

    @property
    def __name__(self) -> str:
        return f"wpo({self.objectives[0].name})"

    @property
    def fixed_direction(self) -> bool:
        return self.objectives[0].fixed_direction

    def own_extras(self) -> Mapping[str, ExtraFacts]:
        return _WEIGHTS

    def __call__(self, *logps: Tensor | None, **keywords: Any) -> Losses:
        weights = keywords["chosen_weights"] * keywords["rejected_weights"]
        if self.clamp:
            weights = weights.clamp(max=1)
        result: Losses = self.results(logps, keywords)[0]
        return result._replace(losses=weights * result.losses)


@dataclass(frozen=True)
class _Combined(Modifier):
    weights: tuple[float, ...]

    @property
    def __name__(self) -> str:
        return f"combine({', '.join(part.name for part in self.objectives)})"

    def __call__(self, *logps: Tensor | None, **keywords: Any) -> Losses:
        results = self.results(logps, keywords)
        pairs = zip(self.weights, results, strict=True)
        losses = sum(weight * result.losses for weight, result in pairs)
        first: Losses = results[0]
        return first._replace(losses=losses)


def _union(parts: tuple[Objective, ...], own: Mapping[str, ExtraFacts]) -> Signature:
    """What the parts take together; where several take an extra, each checks it as well."""
    extras: dict[str, ExtraFacts] = {}
    for name, facts in (item for part in parts for item in part.extras.items()):
        first = extras.get(name, facts)
        extras[name] = dataclasses.replace(
            first,
            required=first.required or facts.required,
            filled=first.filled or facts.filled,
            differentiable=first.differentiable or facts.differentiable,
        )
    extras.update(own)
    hyperparameters = {
        name: dataclasses.replace(known, default=part.hyperparameters[name])
        for part in parts
        for name, known in part.signature.hyperparameters.items()
        if name not in extras and _agree(name, parts)
    }
    longest = max((part.signature.logps for part in parts), key=len)
    return Signature(longest, extras, hyperparameters)


def _agree(name: str, parts: tuple[Objective, ...]) -> bool:
    """Whether all parts that have the hyperparameter hold the same value."""
    known = [part.hyperparameters for part in parts]
    first, *others = [values[name] for values in known if name in values]
    return all(one is first or (not isinstance(one, Tensor) and one == first) for one in others)


def _parts(objective: Objective) -> Iterator[Objective]:
    """The objectives it is made of, itself if it is no composite."""
    if isinstance(objective.function, Modifier):
        for part in objective.function.objectives:
            yield from _parts(part)
    else:
        yield objective
