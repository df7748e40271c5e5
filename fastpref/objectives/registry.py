# SPDX-License-Identifier: Apache-2.0
"""Objectives as values: a function, its hyperparameters, and what an engine must know to run it.

``@objective(...)`` declares a function of this package and registers it under its name; ``get``
makes a configured ``Objective``. Called through either, arguments are checked and results detached
in one place, ``Objective.evaluate``, so a function's body holds its equation and nothing else.
"""

import dataclasses
import difflib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from .results import ListLosses, Losses, PairLosses, TokenLosses, UnitLosses
from .signature import POLICY_LOGPS, REQUIRED, ExtraFacts, Signature, Unit

Scope: TypeAlias = Literal["unit", "pair", "list", "batch", "running"]
SCOPES: tuple[Scope, ...] = ("unit", "pair", "list", "batch", "running")  # narrow to wide

Reduction: TypeAlias = Literal["sum", "mean"]
# Given all hyperparameters by name: why they cannot go together, or None when they can.
Condition: TypeAlias = Callable[..., str | None]

_RESULTS: Mapping[Unit, type[Any]] = {
    "pair": PairLosses,
    "unit": UnitLosses,
    "list": ListLosses,
    "token": TokenLosses,
}
_SHAPES: Mapping[Unit, tuple[str, int]] = {
    "pair": ("(P,)", 1),
    "unit": ("(B,)", 1),
    "list": ("(G, K)", 2),
    "token": ("(B, T)", 2),
}

_CATALOGUE: dict[str, "Objective"] = {}
_FORMULAS: dict[Callable[..., Any], Callable[..., Any]] = {}  # public function -> as written
_CONDITIONS: dict[Callable[..., Any], Condition] = {}
_REDUCTIONS: dict[Callable[..., Any], Reduction] = {}
_SIGNATURES: dict[Callable[..., Any], Signature] = {}  # parsing takes longer than a small loss

P = ParamSpec("P")
R = TypeVar("R", bound=Losses)


class Composite(ABC):
    """A function made of objectives (modifiers.py). It says its signature itself, and what is set
    on it is set in them."""

    signature: Signature

    @property
    @abstractmethod
    def reduction(self) -> Reduction:
        """As that of an ``Objective``."""

    @abstractmethod
    def __call__(self, *logps: Tensor | None, **keywords: Any) -> Losses:
        """As a function of its unit."""

    @abstractmethod
    def replace(self, **hyperparameters: Any) -> "Composite":
        """The same with some hyperparameters changed, all of them known."""


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
    """

    function: Callable[..., Any]
    _: KW_ONLY
    unit: Unit
    scope: Scope
    needs_reference: bool | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    signature: Signature = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unit not in _RESULTS:
            raise ValueError(f"unit must be one of {', '.join(_RESULTS)}, got {self.unit!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if isinstance(self.function, Composite):
            signature = self.function.signature
        else:
            signature = self._registered(_SIGNATURES) or Signature.of(self.function, self.unit)
        object.__setattr__(self, "signature", signature)
        takes_reference = self.unit != "token" and len(signature.logps) > POLICY_LOGPS[self.unit]
        if self.needs_reference and not takes_reference:
            raise ValueError(f"{self.name} has no reference parameters but needs_reference=True")
        if self.needs_reference is None:
            object.__setattr__(self, "needs_reference", takes_reference)
        known = signature.hyperparameters
        _refuse_unknown(self.name, "hyperparameter", [name for name, _ in self.settings], known)
        self._check_hyperparameters(dict(self.settings))

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

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
        declared = self._registered(_REDUCTIONS) or "sum"
        chosen = self.hyperparameters.get("normalize", "mean")  # as ipo lets its user
        return "mean" if declared == chosen == "mean" else "sum"

    @property
    def extras(self) -> Mapping[str, ExtraFacts]:
        """The extras by name: required, filled in by the engine, differentiable."""
        return self.signature.extras

    def replace(self, **hyperparameters: Any) -> "Objective":
        """The same objective with some hyperparameters changed; checks them all."""
        if isinstance(self.function, Composite):
            known = self.signature.hyperparameters
            _refuse_unknown(self.name, "hyperparameter", hyperparameters, known)
            changed = dataclasses.replace(self, function=self.function.replace(**hyperparameters))
        else:
            settings = dict(self.settings) | hyperparameters
            changed = dataclasses.replace(self, settings=tuple(settings.items()))
        missing = [name for name, value in changed.hyperparameters.items() if value is REQUIRED]
        if missing:
            raise TypeError(f"{self.name} needs a value for {', '.join(missing)}")
        return changed

    def __call__(self, *logps: Tensor | None, **extras: Tensor | None) -> Losses:
        """Evaluate on the family's log-probabilities; extras by keyword."""
        keywords = [name for name in extras if name not in self.signature.logps]
        _refuse_unknown(self.name, "extra", keywords, self.extras)
        return self.evaluate(logps, dict(self.settings) | extras)

    def evaluate(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Losses:
        """Check everything, run the formula in fp32 or fp64, and detach all but the losses."""
        args, logps = self.check(args, keywords)
        formula = self._registered(_FORMULAS) or self.function
        result = formula(
            *map(upcast, args),
            **{name: self._prepared(name, value, logps[0]) for name, value in keywords.items()},
        )
        return self._finished(result, [upcast(value) for value in logps])

    def check(
        self, args: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """Raise unless these can be evaluated; returns ``args`` without references that have no
        use, and all log-probabilities, in the order of the signature."""
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
        expected, dimensions = _SHAPES[self.unit]
        for name, value in zip(names, logps, strict=True):
            if value is None and name in names[policy:]:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{self.name}: {name} must be a floating tensor, got {got}")
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
                raise TypeError(f"{self.name} needs the extra {name}")
        chosen = {name: given[name] for name in self.signature.hyperparameters if name in given}
        self._check_hyperparameters(chosen)

    def _check_hyperparameters(self, chosen: Mapping[str, Any]) -> None:
        for name, value in chosen.items():
            self.signature.hyperparameters[name].check(f"{self.name}: {name}", value)
        values, condition = self.hyperparameters | dict(chosen), self._registered(_CONDITIONS)
        if condition is None or any(value is REQUIRED for value in values.values()):
            return
        reason = condition(**values)
        if reason is not None:
            raise ValueError(f"{self.name}: {reason}")

    def _registered(self, by_function: Mapping[Callable[..., Any], Any]) -> Any:
        # A composite is in no table, and torch.compile cannot hash it.
        return None if isinstance(self.function, Composite) else by_function.get(self.function)

    def _prepared(self, name: str, value: Any, logps: Tensor) -> Any:
        facts = self.extras.get(name)
        if facts is None or value is None:
            return upcast(value)
        if facts.shapes and not facts.identifies:
            # Numbers of any dtype, in that of the log-probs: an integer has no logarithm, and a
            # float64 column would turn the loss into one.
            value = value.to(upcast(logps).dtype)
        return upcast(value) if facts.differentiable else upcast(value).detach()

    def _finished(self, result: Any, logps: list[Any]) -> Losses:
        kind = _RESULTS[self.unit]
        if isinstance(result, Tensor) and self.unit != "token":
            result = (result, *_log_ratios(logps, POLICY_LOGPS[self.unit]))
        if not isinstance(result, tuple) or len(result) != len(kind._fields):
            raise TypeError(
                f"{self.name} must return {kind.__name__}({', '.join(kind._fields)}), "
                f"got {type(result).__name__}"
            )
        losses, *others = result
        if losses.shape != logps[0].shape[:1]:
            raise ValueError(
                f"{self.name} must return one loss a {self.unit}, shape "
                f"{tuple(logps[0].shape[:1])}, not reduced; got {tuple(losses.shape)}"
            )
        detached = (None if value is None else value.detach() for value in others)
        return cast(Losses, kind(losses, *detached))


def objective(
    *,
    unit: Unit,
    scope: Scope,
    needs_reference: bool,
    reduction: Reduction = "sum",
    condition: Condition | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare and register an objective of this package; the rest is in its signature."""

    def register(formula: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(formula)
        def function(*args: P.args, **keywords: P.kwargs) -> R:
            return cast(R, declared.evaluate(args, keywords))

        _REDUCTIONS[function] = reduction
        if condition is not None:
            _CONDITIONS[function] = condition
        declared = Objective(function, unit=unit, scope=scope, needs_reference=needs_reference)
        _FORMULAS[function] = formula
        _SIGNATURES[function] = declared.signature
        _CATALOGUE[declared.name] = declared
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
    if name not in _CATALOGUE:
        close = difflib.get_close_matches(name, _CATALOGUE) or list(_CATALOGUE)
        raise ValueError(
            f"no objective is called {name!r}; perhaps {', '.join(close)}? "
            "objectives.names() lists them all"
        )
    return _CATALOGUE[name].replace(**hyperparameters)


def names() -> tuple[str, ...]:
    """The names of all objectives, in the order of the catalogue."""
    return tuple(_CATALOGUE)


def catalogue() -> tuple[Objective, ...]:
    """All objectives, as declared: a required hyperparameter is not set."""
    return tuple(_CATALOGUE.values())


def as_objective(
    objective: str | Objective | Callable[..., Any], **hyperparameters: Any
) -> Objective:
    """What an engine was given, as an ``Objective``.

    A name or a function of this package keeps its declared facts; any other callable is taken as
    pairwise with scope "batch", which is right for every pairwise function.
    """
    if isinstance(objective, str):
        return get(objective, **hyperparameters)
    if not isinstance(objective, Objective):
        if not callable(objective):
            raise TypeError(
                "objective must be a name, an Objective or a callable, "
                f"got {type(objective).__name__}"
            )
        declared = [known for known in _CATALOGUE.values() if known.function is objective]
        objective = declared[0] if declared else Objective(objective, unit="pair", scope="batch")
    return objective.replace(**hyperparameters)


def _refuse_unknown(objective: str, kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        valid = ", ".join(known) or "none"
        hint = ""
        if kind == "extra":
            hint = "; hyperparameters are set by objectives.get(name, ...) or .replace(...)"
        raise TypeError(f"{objective} has no {kind} {', '.join(unknown)}; it has: {valid}{hint}")


def _log_ratios(logps: list[Any], policy: int) -> list[Any]:
    """Policy minus reference; the policy's own log-probs where there is none."""
    references = logps[policy:] or [None] * policy
    pairs = zip(logps[:policy], references, strict=True)
    return [p if ref is None else p - ref for p, ref in pairs]


def upcast(value: Any) -> Any:
    """Half precision to fp32: a sum of a thousand tokens in bf16 is several nats off."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
