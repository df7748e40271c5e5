# SPDX-License-Identifier: Apache-2.0
"""What an objective's signature says: its log-probabilities, its extras and its hyperparameters.

The signature is the declaration. A parameter annotated with one of the names below tells the caller
what it is, the engine what to fill in, and the check what to allow:

    chosen_lengths: Filled          an extra shaped like the log-probs, filled in by the engine
    reward_margin: Extra            an extra shaped like the log-probs, given by the caller
    running_mean: State             a number that the training keeps, 0-dim
    beta: Beta = 0.1                a hyperparameter and its domain: a number, or one value a unit
    tau: SharedPositive = 1.0       one number for the whole batch
    normalize: Literal["mean", "sum"] = "mean"
    dp_group: Group = None          the process group of batch-wide statistics
"""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import conversion, hint, is_number
from .reading import readable

Unit: TypeAlias = Literal["pair", "unit", "list", "token"]

# Leading positional parameters of each family: of the policy, and in all.
POLICY_LOGPS: Mapping[Unit, int] = {"pair": 2, "unit": 1, "list": 1, "token": 1}
LOGPS: Mapping[Unit, int] = {"pair": 4, "unit": 2, "list": 2, "token": 2}
# What a function of one's own is called with.
CALLED_WITH: Mapping[Unit, tuple[str, ...]] = {
    "pair": ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"),
    "unit": ("policy", "ref"),
    "list": ("policy", "ref"),
    "token": ("policy", "old"),
}

REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Domain:
    """The interval a hyperparameter lives in; ``meaning`` is the paper's reason for it."""

    low: float = -math.inf
    high: float = math.inf
    includes: tuple[float, ...] = ()  # the ends that belong to it
    meaning: str = ""
    per_unit: bool = False  # a hyperparameter may also be a tensor, one value a unit
    zero_per_unit: bool = False  # which may then be 0: no weight

    def contains(self, value: Any) -> bool:
        return bool(self.low < value < self.high) or value in self.includes

    def holds(self, values: Tensor) -> Tensor:
        """Elementwise ``contains``."""
        inside = (values > self.low) & (values < self.high)
        for end in self.includes:
            inside |= values == end
        return inside

    def check_units(self, label: str, values: Tensor) -> None:
        """Raise TypeError or ValueError unless ``values`` will do for a hyperparameter."""
        if not self.per_unit:
            raise TypeError(
                f"{label} must be a number, got a tensor of shape {tuple(values.shape)}; the whole "
                "batch shares it"
            )
        if values.dtype == torch.bool or values.is_complex():
            raise TypeError(f"{label} must be numbers, got {values.dtype}")
        if values.dim() != 1:
            raise ValueError(
                f"{label} must be a number or one value a unit, got a tensor of shape "
                f"{tuple(values.shape)}; take .item(), or .expand(units)"
            )
        domain = replace(self, includes=(*self.includes, 0.0)) if self.zero_per_unit else self
        domain.check_values(label, values)

    def no_number(self, label: str, value: Any) -> TypeError:
        """Of a ``value`` that is neither a number nor a tensor."""
        expected = "a number, or a tensor of one value a unit" if self.per_unit else "a number"
        remedy = ""
        if isinstance(value, str):
            remedy = "; use float()"
        elif hasattr(value, "__len__"):
            remedy = f"; {conversion(value)}" if self.per_unit else "; the whole batch shares it"
        return TypeError(f"{label} must be {expected}, got {type(value).__name__}{remedy}")

    def check_values(self, label: str, values: Tensor) -> None:
        """Raise ValueError unless the domain holds all ``values``; on CPU only, elsewhere reading
        them would wait for the device."""
        if not readable(values):
            return
        outside = values.detach()[~self.holds(values.detach())]
        if outside.numel():
            raise ValueError(f"{label} must be {self}, got {outside[0].item():g}")

    def __str__(self) -> str:
        if not self.low < self.high:
            return " or ".join(f"{value:g}" for value in self.includes)
        if math.inf == self.high == -self.low:
            return "finite"
        if self.high == math.inf and self.high not in self.includes:
            return f"{'>=' if self.low in self.includes else '>'} {self.low:g}"
        left, right = "[" if self.low in self.includes else "(", "]"
        return f"in {left}{self.low:g}, {self.high:g}{right if self.high in self.includes else ')'}"


_ZERO_OR_ONE = Domain(0.0, 0.0, includes=(0.0, 1.0))

# Of an extra beside the log-probabilities: like them; one value a response (their first dimension);
# rows of any width, one a response; one number.
Shape: TypeAlias = Literal["logps", "unit", "rows", "number"]


@dataclass(frozen=True, slots=True)
class _ShapeRule:
    admits: Callable[[Tensor, Tensor], bool]
    text: Callable[[Tensor], str]


_SHAPES: Mapping[Shape, _ShapeRule] = {
    "logps": _ShapeRule(
        lambda value, logps: value.shape == logps.shape,
        lambda logps: f"shaped like the log-probs, {tuple(logps.shape)}",
    ),
    "unit": _ShapeRule(
        lambda value, logps: value.shape == logps.shape[:1],
        lambda logps: f"one value a response, {tuple(logps.shape[:1])}",
    ),
    "rows": _ShapeRule(
        lambda value, logps: value.dim() == 2 and value.shape[:1] == logps.shape[:1],
        lambda logps: f"one row a response, ({logps.shape[0]}, D)",
    ),
    "number": _ShapeRule(
        lambda value, logps: value.dim() == 0,
        lambda logps: "a 0-dim tensor",
    ),
}


@dataclass(frozen=True, slots=True)
class ExtraFacts:
    """What the engine must know about an extra."""

    required: bool = True
    shapes: tuple[Shape, ...] = ()  # those allowed; any where there are none
    filled: bool = False  # preference_loss makes it when the caller does not
    differentiable: bool = False  # otherwise detached
    domain: Domain | None = None  # of its values
    binary: bool = False  # its values are 0 and 1, or bool
    identifies: bool = False  # its values name something; all others are numbers

    @property
    def aligned(self) -> bool:
        """Whether it has one value a log-probability."""
        return "logps" in self.shapes

    def check(self, label: str, value: Any, logps: Tensor, mask: Tensor | None) -> None:
        """Raise TypeError or ValueError, starting with ``label``, unless ``value`` will do beside
        ``logps``. What stands where ``mask`` is 0 may be anything."""
        if not isinstance(value, Tensor):
            got = type(value).__name__
            raise TypeError(f"{label} must be a tensor, got {got}; {conversion(value)}")
        allowed = [_SHAPES[shape] for shape in self.shapes]
        if allowed and not any(shape.admits(value, logps) for shape in allowed):
            wanted = " or ".join(shape.text(logps) for shape in allowed)
            raise ValueError(f"{label} must be {wanted}, got {tuple(value.shape)}")
        if mask is not None and mask.shape == value.shape and readable(value):
            value = value[mask != 0]
        if self.domain is not None:
            self.domain.check_values(label, value)
        if self.binary and value.dtype != torch.bool:
            _ZERO_OR_ONE.check_values(label, value)


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """One keyword with its default (``REQUIRED`` when there is none) and its domain."""

    default: Any
    domain: Domain | None = None
    choices: tuple[Any, ...] | None = None
    optional: bool = False  # None is allowed
    kind: type[Any] | None = None  # what it must be an instance of

    def check(self, label: str, value: Any) -> None:
        """Raise TypeError or ValueError, starting with ``label``, unless ``value`` is allowed."""
        if value is None and self.optional:
            return
        if self.choices is not None:
            if value not in self.choices:
                options = ", ".join(map(repr, self.choices))
                names = [one for one in self.choices if isinstance(one, str)]
                raise ValueError(
                    f"{label} must be one of {options}, got {value!r}{hint(value, names)}"
                )
        elif self.domain is not None:
            if isinstance(value, Tensor):
                self.domain.check_units(label, value)
                return
            if not is_number(value):
                raise self.domain.no_number(label, value)
            if not self.domain.contains(value):
                meaning = f" ({self.domain.meaning})" if self.domain.meaning else ""
                raise ValueError(f"{label} must be {self.domain}{meaning}, got {value!r}")
        elif self.kind is not None and not isinstance(value, self.kind):
            raise TypeError(
                f"{label} must be a {self.kind.__name__} or None, got {type(value).__name__}"
            )


Extra: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("logps",))]
Filled: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("logps",), filled=True)]
FilledWithGrad: TypeAlias = Annotated[
    Tensor, ExtraFacts(shapes=("logps",), filled=True, differentiable=True)
]
State: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("number",))]
PerResponseOrToken: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("unit", "logps"))]
Embeddings: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("rows",))]
Probabilities: TypeAlias = Annotated[
    Tensor, ExtraFacts(shapes=("logps",), domain=Domain(0.0, 1.0, includes=(0.0, 1.0)))
]
Labels: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("logps",), binary=True)]
Outcomes: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("unit",), binary=True)]
Identifiers: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("unit",), identifies=True)]
Ranks: TypeAlias = Annotated[
    Tensor, ExtraFacts(shapes=("logps",), domain=Domain(low=1.0, includes=(1.0,)))
]
NotNegativeExtra: TypeAlias = Annotated[
    Tensor, ExtraFacts(shapes=("logps",), domain=Domain(low=0.0, includes=(0.0,)))
]
PositiveExtra: TypeAlias = Annotated[Tensor, ExtraFacts(shapes=("logps",), domain=Domain(low=0.0))]

Group: TypeAlias = Annotated[dist.ProcessGroup | None, dist.ProcessGroup]
# A number, or one value a unit: (P,), (B,), or of lists (G,).
PerUnit: TypeAlias = float | Tensor
Finite: TypeAlias = Annotated[PerUnit, Domain(per_unit=True)]
Positive: TypeAlias = Annotated[PerUnit, Domain(low=0.0, per_unit=True)]
NotNegative: TypeAlias = Annotated[PerUnit, Domain(low=0.0, includes=(0.0,), per_unit=True)]
Beta: TypeAlias = Annotated[PerUnit, Domain(low=0.0, per_unit=True, zero_per_unit=True)]

_SMOOTHING = Domain(
    0.0, 0.5, includes=(0.0,), meaning="the share of flipped labels; at 1/2 none informs"
)
LabelSmoothing: TypeAlias = Annotated[PerUnit, replace(_SMOOTHING, per_unit=True)]

# One number for the whole batch.
SharedPositive: TypeAlias = Annotated[float, Domain(low=0.0)]
SharedNotNegative: TypeAlias = Annotated[float, Domain(low=0.0, includes=(0.0,))]
SharedLabelSmoothing: TypeAlias = Annotated[float, _SMOOTHING]


@dataclass(frozen=True, slots=True)
class Signature:
    """The parsed parameters of one objective."""

    logps: tuple[str, ...]
    extras: Mapping[str, ExtraFacts]
    hyperparameters: Mapping[str, Hyperparameter]

    @classmethod
    def of(cls, function: Callable[..., Any], unit: Unit) -> "Signature":
        """Read ``function``; a parameter without annotation is judged by its default.

        The leading positional parameters without a default, or with None, are log-probabilities (at
        most as many as the family has). Of the others, a tensor is an extra and so is an
        unannotated parameter with no default or None; the rest are hyperparameters.
        """
        hints = _hints(function)
        _check_module(function, unit)
        logps: list[str] = []
        extras: dict[str, ExtraFacts] = {}
        hyperparameters: dict[str, Hyperparameter] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL and not logps:
                logps = [f"logps[{i}]" for i in range(LOGPS[unit])]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            nothing = parameter.default is None or parameter.default is REQUIRED
            leading = not extras and not hyperparameters and len(logps) < LOGPS[unit]
            if leading and nothing and parameter.kind is not parameter.KEYWORD_ONLY:
                logps.append(name)
                continue
            alternatives = _alternatives(hints.get(name))
            tensor = next((a for a in alternatives if _bare(a) is Tensor), None)
            if tensor is not None or (nothing and name not in hints):
                extras[name] = replace(
                    _fact(tensor, ExtraFacts) or ExtraFacts(),
                    required=parameter.default is REQUIRED,
                )
            else:
                hyperparameters[name] = _hyperparameter(parameter.default, alternatives)
        if len(logps) < POLICY_LOGPS[unit]:
            raise TypeError(
                f"an objective with unit={unit!r} takes at least {POLICY_LOGPS[unit]} positional "
                f"log-probabilities, got ({', '.join(logps)})"
            )
        return cls(tuple(logps), extras, hyperparameters)


def _check_module(function: Callable[..., Any], unit: Unit) -> None:
    """Raise TypeError unless a module takes what it is called with: ``__call__``, the same of all,
    does not say."""
    if not isinstance(function, torch.nn.Module):
        return
    own = inspect.signature(function.forward)
    names = CALLED_WITH[unit]
    try:
        own.bind(*names)
    except TypeError as error:
        raise TypeError(
            f"objective is called with ({', '.join(names)}), log-probabilities, but "
            f"{type(function).__name__} takes ({', '.join(own.parameters)}); write a function of "
            f"these that returns one loss a {unit}"
        ) from error


def _hyperparameter(default: Any, alternatives: tuple[Any, ...]) -> Hyperparameter:
    choices = tuple(
        value
        for hint in alternatives
        if typing.get_origin(hint) is Literal
        for value in typing.get_args(hint)
    )
    domains = [fact for hint in alternatives if (fact := _fact(hint, Domain)) is not None]
    kinds = [fact for hint in alternatives if (fact := _fact(hint, type)) is not None]
    return Hyperparameter(
        default,
        domains[0] if domains else None,
        choices or None,
        optional=type(None) in alternatives or default is None,
        kind=kinds[0] if kinds else None,
    )


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Resolved annotations; none for what has none to resolve (a partial, a TYPE_CHECKING name)."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return {}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the hint itself when it is none."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _bare(hint: Any) -> Any:
    return hint.__origin__ if typing.get_origin(hint) is Annotated else hint


def _fact(hint: Any, kind: type[Any]) -> Any:
    """The ``kind`` instance in the metadata of an Annotated hint, or None."""
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, kind)), None)
