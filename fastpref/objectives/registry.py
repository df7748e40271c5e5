# SPDX-License-Identifier: Apache-2.0
"""Objectives as values: a function, its hyperparameters, and what an engine must know to run it.

``@objective(...)`` registers a function of this package under its name, as one ``Registration``;
``get`` makes an ``Objective`` of it. Called through either, arguments are checked and results
detached in one place, ``Objective.evaluate``, so a function's body holds its equation and nothing
else.
"""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from .checks import as_python, closest, conversion, hint
from .documentation import documented, readable_signature
from .results import Losses, as_result
from .signature import LOGPS, POLICY_LOGPS, REQUIRED, ExtraFacts, Signature, Unit

Scope: TypeAlias = Literal["unit", "pair", "list", "batch", "running"]
SCOPES: tuple[Scope, ...] = ("unit", "pair", "list", "batch", "running")  # narrow to wide

Reduction: TypeAlias = Literal["sum", "mean"]
# Given all hyperparameters by name: why they cannot go together, or None when they can.
Condition: TypeAlias = Callable[..., str | None]

_LOGPS_SHAPES: Mapping[Unit, tuple[str, int]] = {  # and how many dimensions
    "pair": ("(P,)", 1),
    "unit": ("(B,)", 1),
    "list": ("(G, K)", 2),
    "token": ("(B, T)", 2),
}

P = ParamSpec("P")
R = TypeVar("R", bound=Losses)


class Composite(ABC):
    """A function made of objectives, such as those of modifiers.py. Its hyperparameters are theirs,
    set in them by ``replace``."""

    signature: Signature

    @property
    @abstractmethod
    def reduction(self) -> Reduction:
        """As that of an ``Objective``."""

    @property
    @abstractmethod
    def fixed_direction(self) -> bool:
        """As that of an ``Objective``."""

    @abstractmethod
    def __call__(self, *logps: Tensor | None, **extras: Any) -> Losses:
        """As an ``Objective`` is called."""

    @abstractmethod
    def replace(self, **hyperparameters: Any) -> "Composite":
        """The same with some of its hyperparameters changed."""


@dataclass(frozen=True)
class Objective:
    """An objective function with its hyperparameters set.

    Args:
        function: takes the family's log-probabilities first, then extras and hyperparameters by
            keyword, and returns the family's result tuple. A function of one's own may also return
            a plain tuple of the same fields, or the losses alone; the rewards are then the
            log-ratios, without a reference the log-probs. First come, by family:
            pair (policy_chosen, policy_rejected, ref_chosen, ref_rejected), each (P,);
            unit (policy, ref), each (B,); list (policy, ref), each (G, K);
            token (policy, old), each (B, T). What a function does not need it may leave out.
            It may be called more than once for one loss, and must then return the same.
        unit: the family: "pair", "unit", "list" or "token".
        scope: what must be known before a loss is: "unit", "pair", "list", "batch" or "running".
        needs_reference: by default, whether ``function`` has parameters for a reference.
        settings: hyperparameters that differ from the defaults; set them with ``replace``.

    Attributes:
        signature: what it takes: log-probabilities, extras and hyperparameters.
    """

    function: Callable[..., Any]
    _: KW_ONLY
    unit: Unit
    scope: Scope
    needs_reference: bool | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    signature: Signature = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unit not in LOGPS:
            raise ValueError(
                f"unit must be one of {', '.join(LOGPS)}, got {self.unit!r}{hint(self.unit, LOGPS)}"
            )
        if self.scope not in SCOPES:
            raise ValueError(
                f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}"
                f"{hint(self.scope, SCOPES)}"
            )
        if isinstance(self.function, Composite):
            signature = self.function.signature
        elif self.registration is not None:
            signature = self.registration.objective.signature
        else:
            signature = Signature.of(self.function, self.unit)
        object.__setattr__(self, "signature", signature)
        takes_reference = self.unit != "token" and len(signature.logps) > POLICY_LOGPS[self.unit]
        if self.needs_reference and not takes_reference:
            raise ValueError(f"{self.name} has no reference parameters but needs_reference=True")
        if self.needs_reference is None:
            object.__setattr__(self, "needs_reference", takes_reference)
        known = signature.hyperparameters
        _refuse_unknown(self, "hyperparameter", [name for name, _ in self.settings], known)
        self._check_hyperparameters(dict(self.settings))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Objective):
            return NotImplemented
        return self._compared() == other._compared()

    def _compared(self) -> tuple[Any, ...]:
        # A tensor by its identity, as it is hashed: reading it would wait for the device.
        settings = (
            (name, id(value) if isinstance(value, Tensor) else value)
            for name, value in self.settings
        )
        return self.function, self.unit, self.scope, self.needs_reference, *settings

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def registration(self) -> "Registration | None":
        """Of a function of this package; None of any other."""
        found = _REGISTERED.get(self.name)
        return found if found is not None and found.objective.function is self.function else None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter with its value; a required one not yet set is ``REQUIRED``."""
        defaults = {name: p.default for name, p in self.signature.hyperparameters.items()}
        return defaults | dict(self.settings)

    @property
    def reduction(self) -> Reduction:
        """Whether it compares sums over a response or means over its tokens. It takes sums either
        way, and for means the lengths beside them."""
        if isinstance(self.function, Composite):
            return self.function.reduction
        if self.registration is None:
            return "sum"
        chosen = self.hyperparameters.get("normalize", "mean")  # as ipo lets its user
        return "mean" if self.registration.reduction == chosen == "mean" else "sum"

    @property
    def fixed_direction(self) -> bool:
        """Whether the gradient of a unit's loss at what is scored keeps its direction whatever the
        scores are, so that only its length depends on them; False where nobody says so."""
        if isinstance(self.function, Composite):
            return self.function.fixed_direction
        return self.registration is not None and self.registration.fixed_direction

    @property
    def extras(self) -> Mapping[str, ExtraFacts]:
        """The extras by name: required, filled in by the engine, differentiable."""
        return self.signature.extras

    def replace(self, **hyperparameters: Any) -> "Objective":
        """The same objective with some hyperparameters changed; checks them all."""
        if isinstance(self.function, Composite):
            known = self.signature.hyperparameters
            _refuse_unknown(self, "hyperparameter", hyperparameters, known)
            changed = dataclasses.replace(self, function=self.function.replace(**hyperparameters))
        else:
            given = {name: as_python(value) for name, value in hyperparameters.items()}
            settings = dict(self.settings) | given
            changed = dataclasses.replace(self, settings=tuple(settings.items()))
        missing = [name for name, value in changed.hyperparameters.items() if value is REQUIRED]
        if missing:
            raise TypeError(f"{self.name} needs a value for {', '.join(missing)}")
        return changed

    def __call__(self, *logps: Tensor | None, **extras: Tensor | None) -> Losses:
        """Evaluate on the family's log-probabilities; extras by keyword, and hyperparameters of one
        value a unit in place of those that are set."""
        known = self.signature.hyperparameters
        keywords = [
            name
            for name, value in extras.items()
            if name not in self.signature.logps
            and not (name in known and isinstance(value, Tensor))
        ]
        _refuse_unknown(self, "extra", keywords, self.extras)
        return self.evaluate(logps, dict(self.settings) | extras)

    def evaluate(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Losses:
        """Check everything, run the formula in fp32 or fp64, and detach all but the losses.

        Args:
            args: the family's log-probabilities, in the order of the signature.
            keywords: extras and hyperparameters by name, and log-probabilities not in ``args``.
        """
        args, logps = self.check(args, keywords)
        formula = self.function if self.registration is None else self.registration.formula
        result = formula(
            *map(upcast, args),
            **{name: self._prepared(name, value, logps[0]) for name, value in keywords.items()},
        )
        return as_result(self.name, self.unit, result, [upcast(value) for value in logps])

    def check(
        self, args: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """Raise unless these can be evaluated.

        Args:
            args: as in ``evaluate``.
            keywords: as in ``evaluate``.

        Returns:
            ``args`` without references that have no use, and all log-probabilities, in the order of
            the signature.

        Raises:
            TypeError, ValueError: naming what is wrong or missing.
        """
        names = self.signature.logps
        while len(args) > len(names) and args[-1] is None:
            args = args[:-1]
        if len(args) > len(names):
            raise TypeError(f"{self.name} takes ({', '.join(names)}), got {len(args)} tensors")
        given = dict(zip(names, args, strict=False)) | dict(keywords)
        logps = [given.get(name) for name in names]
        self._check_logps(logps)
        self._check_keywords(given, cast(Tensor, logps[0]))
        return args, logps

    def _check_logps(self, logps: list[Any]) -> None:
        names, policy = self.signature.logps, POLICY_LOGPS[self.unit]
        for name, value in zip(names[:policy], logps[:policy], strict=True):
            if value is None:
                raise TypeError(f"{self.name} needs the log-probabilities {name}")
        for name, value in zip(names[policy:], logps[policy:], strict=True):
            if self.needs_reference and value is None:
                raise ValueError(
                    f"{self.name} needs a reference but {name} is None; "
                    "pass zeros for a uniform reference"
                )
            if not self.needs_reference and value is not None and self.unit != "token":
                raise ValueError(f"{self.name} takes no reference, got {name}; leave it None")
        shape = tuple(getattr(logps[0], "shape", ()))
        expected, dimensions = _LOGPS_SHAPES[self.unit]
        for name, value in zip(names, logps, strict=True):
            if value is None and name in names[policy:]:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                is_tensor = isinstance(value, Tensor)
                got = value.dtype if is_tensor else type(value).__name__
                remedy = "use .float()" if is_tensor else conversion(value)
                raise TypeError(
                    f"{self.name}: {name} must be a floating tensor, got {got}; {remedy}"
                )
            if value.shape != shape or value.dim() != dimensions:
                raise ValueError(
                    f"{self.name}: the log-probs must all be {expected}, got {names[0]} {shape} "
                    f"and {name} {tuple(value.shape)}"
                )

    def _check_keywords(self, given: Mapping[str, Any], logps: Tensor) -> None:
        mask = given.get("mask") if "mask" in self.extras else None
        for name, facts in self.extras.items():
            value = given.get(name)
            if value is not None:
                facts.check(f"{self.name}: {name}", value, logps, mask)
            elif facts.required:
                own = {*self.signature.logps, *self.extras, *self.signature.hyperparameters}
                near = closest(name, [one for one in given if one not in own])
                remedy = f"got {near[0]!r} instead" if near else f"pass {name}=... by keyword"
                raise TypeError(f"{self.name} needs the extra {name}; {remedy}")
        known = self.signature.hyperparameters
        chosen = {name: given[name] for name in known if name in given}
        self._check_hyperparameters(chosen)
        for name, value in chosen.items():
            per_unit = isinstance(value, Tensor) and known[name].domain is not None
            if per_unit and value.shape != logps.shape[:1]:
                raise ValueError(
                    f"{self.name}: {name} must be a number or one value a unit, "
                    f"{tuple(logps.shape[:1])}, got {tuple(value.shape)}"
                )

    def _check_hyperparameters(self, chosen: Mapping[str, Any]) -> None:
        for name, value in chosen.items():
            self.signature.hyperparameters[name].check(f"{self.name}: {name}", value)
        condition = self.registration.condition if self.registration is not None else None
        values = self.hyperparameters | dict(chosen)
        if condition is None or any(value is REQUIRED for value in values.values()):
            return
        reason = condition(**values)
        if reason is not None:
            raise ValueError(f"{self.name}: {reason}")

    def _prepared(self, name: str, value: Any, logps: Tensor) -> Any:
        facts = self.extras.get(name)
        if value is None:
            return None
        if facts is None:
            known = self.signature.hyperparameters.get(name)
            per_unit = isinstance(value, Tensor) and known is not None and known.domain is not None
            own = as_python(value)
            return own.to(upcast(logps).dtype) if per_unit else upcast(own)
        if facts.shapes and not facts.identifies:
            # Numbers of any dtype, in that of the log-probs: an integer has no logarithm, and a
            # float64 column would turn the loss into one.
            value = value.to(upcast(logps).dtype)
        return upcast(value) if facts.differentiable else upcast(value).detach()


@dataclass(frozen=True)
class Registration:
    """All that is known of an objective of this package.

    Args:
        objective: the function as it is called, its signature, unit and scope; nothing is set.
        formula: the function as it is written.
        reduction: whether it compares sums over a response or means over its tokens.
        condition: on the hyperparameters together.
        loss_per_unit: whether ``losses[i]`` is that of unit i; False where losses are sorted, or
            one value of the batch is repeated.
        trains_rejected: whether the rejected responses of a pair have a gradient.
        loss_type: what TRL's trainer of its unit (DPO, KTO or GRPO) calls it, and Liger-Kernel
            where it has it; None where TRL has it not.
        fixed_direction: whether the gradient of a unit's loss at what is scored keeps its direction
            whatever the scores are: the loss is a function of one number that is linear in them.
            ``preference_loss`` may then read the direction off where all scores, those of the
            reference too, are 0 (the gradient must not vanish there unless it does everywhere), and
            multiply by the length later. Of one that has no fixed direction gradients are wrong.
    """

    objective: Objective
    formula: Callable[..., Any]
    reduction: Reduction
    condition: Condition | None
    loss_per_unit: bool
    trains_rejected: bool
    loss_type: str | None
    fixed_direction: bool


_REGISTERED: dict[str, Registration] = {}  # by name, in the order of the catalogue


def objective(
    *,
    unit: Unit,
    scope: Scope,
    needs_reference: bool,
    reduction: Reduction = "sum",
    condition: Condition | None = None,
    loss_per_unit: bool = True,
    trains_rejected: bool = True,
    loss_type: str | None = None,
    fixed_direction: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register an objective of this package: a ``Registration``, whose signature is the
    function's own."""

    def register(formula: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(formula)
        def function(*args: P.args, **keywords: P.kwargs) -> R:
            return cast(R, plain.evaluate(args, keywords))

        plain = Objective(function, unit=unit, scope=scope, needs_reference=needs_reference)
        function.__doc__ = documented(formula, plain.signature, unit, needs_reference)
        cast(Any, function).__signature__ = readable_signature(formula)
        _REGISTERED[plain.name] = Registration(
            plain,
            formula,
            reduction,
            condition,
            loss_per_unit,
            trains_rejected,
            loss_type,
            fixed_direction,
        )
        return function

    return register


def get(name: str, **hyperparameters: Any) -> Objective:
    """The objective called ``name`` with its hyperparameters set; the others keep their defaults.

    Raises ValueError on an unknown name or a value outside its domain, TypeError on an unknown or
    missing hyperparameter.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"name must be the name of an objective, got {type(name).__name__}; "
            "objectives.names() lists them all"
        )
    return unset(name).replace(**hyperparameters)


def names() -> tuple[str, ...]:
    """The names of all objectives, in the order of the catalogue."""
    return tuple(_REGISTERED)


def registered(name: str) -> Objective:
    """The objective called ``name``, nothing set: a required hyperparameter has no value."""
    return _REGISTERED[name].objective


def catalogue() -> tuple[Objective, ...]:
    """All objectives, nothing set."""
    return tuple(one.objective for one in _REGISTERED.values())


def loss_types(unit: Unit) -> dict[str, str]:
    """The objectives that TRL's trainer of ``unit`` has too: its ``loss_type`` -> their name."""
    return {
        one.loss_type: name
        for name, one in _REGISTERED.items()
        if one.objective.unit == unit and one.loss_type is not None
    }


def as_objective(
    objective: str | Objective | Callable[..., Any], **hyperparameters: Any
) -> Objective:
    """What an engine was given, as an ``Objective``.

    Args:
        objective: a name or a function of this package is what it is registered as, an
            ``Objective`` itself; any other callable is taken as pairwise with scope "batch", which
            is right for every pairwise function.
        hyperparameters: set in it; others keep their values.
    """
    return unset(objective).replace(**hyperparameters)


def unset(objective: str | Objective | Callable[..., Any]) -> Objective:
    """As ``as_objective``, before hyperparameters are set."""
    if isinstance(objective, str):
        if objective not in _REGISTERED:
            raise ValueError(unknown(objective, "objectives.names() lists them all"))
        return registered(objective)
    if not isinstance(objective, Objective):
        if not callable(objective):
            raise TypeError(
                "objective must be a name, an Objective or a callable, "
                f"got {type(objective).__name__}"
            )
        found = [one for one in catalogue() if one.function is objective]
        objective = found[0] if found else Objective(objective, unit="pair", scope="batch")
    return objective


# Public functions that make an objective of others, and what they do.
_MODIFIERS = {"wpo": "weighs another objective", "combine": "adds objectives up"}


def unknown(name: str, listing: str) -> str:
    """What to say of a name that no objective has; ``listing`` says where all are."""
    if name in _MODIFIERS:
        return f"{name} {_MODIFIERS[name]}: help(fastpref.objectives.{name})"
    close = closest(name, _REGISTERED, _called_elsewhere())
    perhaps = f"perhaps {', '.join(close)}? " if close else ""
    return f"no objective is called {name!r}; {perhaps}{listing}"


def extra_names(objective: Objective) -> tuple[str, ...]:
    """What an engine is given as extras: log-probs of the policy that sampled among them."""
    old = objective.signature.logps[1:] if objective.unit == "token" else ()
    return (*objective.extras, *old)


def _called_elsewhere() -> dict[str, str]:
    """What TRL calls or has called objectives -> their name."""
    types = {one.loss_type: name for name, one in _REGISTERED.items() if one.loss_type is not None}
    return types | {"kto_pair": "kto", "aot_pair": "aot"}


def _refuse_unknown(
    objective: Objective, kind: str, given: Iterable[str], known: Collection[str]
) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        valid, remedy = ", ".join(known) or "none", _where(objective, unknown[0], known)
        if kind == "extra":
            remedy += "; hyperparameters are set by objectives.get(name, ...) or .replace(...)"
        raise TypeError(
            f"{objective.name} has no {kind} {', '.join(unknown)}; it has: {valid}{remedy}"
        )


def _where(objective: Objective, name: str, known: Collection[str]) -> str:
    """Where what is not ``known`` goes, as far as that can be told."""
    found = closest(name, [*known, *extra_names(objective)])
    if not found:
        return ""
    if found[0] in known:
        return hint(name, found)
    meant = f"{found[0]} is" if found[0] == name else f"did you mean {found[0]}? It is"
    return f"; {meant} an extra: preference_loss(..., extras={{{found[0]!r}: ...}})"


def upcast(value: Any) -> Any:
    """Half precision to fp32: a sum of a thousand tokens in bf16 is several nats off."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
