# SPDX-License-Identifier: Apache-2.0
"""The extras that an objective takes and the numbers of a batch already say: lengths, mean
likelihoods, masks. They are made when the objective takes them and the caller gave none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..objectives import Objective
from ..objectives.checks import closest, conversion
from ..objectives.reading import readable
from ..objectives.signature import ExtraFacts
from .layouts import Arrangement
from .numbers import Numbers

_LENGTHS = ("chosen_lengths", "rejected_lengths")
_OF_TOKENS = ("mask", "ref_token_logp")


def to_be_filled(objective: Objective, given: Mapping[str, Tensor] | None = None) -> list[str]:
    """The extras that are made for the objective, where the numbers say them, beside what is
    ``given``."""
    of_tokens = objective.unit == "token"
    return [
        name
        for name, facts in objective.extras.items()
        if name not in (given or {})
        # A function of one's own says by the name alone what it takes.
        and (name in _OF_TOKENS if of_tokens else facts.filled or not facts.shapes)
    ]


def filled_extras(
    objective: Objective, given: Mapping[str, Tensor], numbers: Numbers, arrangement: Arrangement
) -> dict[str, Tensor]:
    """``given``, and what the objective takes beside it and ``numbers`` say.

    Raises:
        ValueError: naming a required extra that is neither, and its shape.
    """
    extras, filled = dict(given), to_be_filled(objective)
    _check_lengths(filled, given, numbers, arrangement)
    for names, make in (_makers(numbers, arrangement) | numbers.makers).items():
        if any(name in filled and name not in given for name in names):
            made = zip(names, make(), strict=False)
            extras = {name: one for name, one in made if name in filled} | extras
    for name, facts in objective.extras.items():
        if facts.required and name not in extras:
            near = closest(name, [one for one in given if one not in objective.extras])
            instead = f"; got {near[0]!r} instead" if near else ""
            raise ValueError(
                f"{objective.name} needs extras={{{name!r}: ...}}, "
                f"{_shape_of(facts, objective)}{instead}"
            )
    return extras


def _makers(
    numbers: Numbers, arrangement: Arrangement
) -> dict[tuple[str, ...], Callable[[], tuple[Tensor, ...]]]:
    """By the names of what each returns, of which there may be fewer."""
    lengths, tokens = numbers.lengths, numbers.tokens
    if tokens is not None:
        reference = () if tokens.ref_logp is None else (tokens.ref_logp,)
        return {("mask",): lambda: (tokens.scored,), ("ref_token_logp",): lambda: reference}
    if lengths is None:
        return {}
    return {
        _LENGTHS: lambda: arrangement.split(lengths()),
        ("lengths",): lambda: arrangement.split(lengths()),
        ("chosen_nll",): lambda: arrangement.split(-numbers.logps / lengths().clamp(min=1)),
    }


def _check_lengths(
    filled: Sequence[str], given: Mapping[str, Tensor], numbers: Numbers, arrangement: Arrangement
) -> None:
    """Lengths are numbers of scored tokens; where there are none any number will do."""
    checked = [name for name in (*_LENGTHS, "lengths") if name in given and name in filled]
    if numbers.lengths is None or not checked or not readable(numbers.logps):
        return
    sides = arrangement.split(numbers.lengths())
    for name in checked:
        own, wanted = sides[-1 if name.startswith("rejected") else 0], given[name]
        if wanted.shape != own.shape:
            continue  # which the objective refuses
        wrong = (wanted != own) & (own > 0)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"{name} must be the numbers of scored tokens, as cu_seqlens and target say them: "
                f"got {wanted[first].item()} for response {first}, which has {int(own[first])}; "
                "leave it out, it is filled in"
            )


def _shape_of(facts: ExtraFacts, objective: Objective) -> str:
    like = {"pair": "(P,)", "unit": "(B,)", "list": "(G, K)", "token": "(B, T)"}[objective.unit]
    shapes = {"logps": f"a {like} tensor", "unit": f"a ({like[1]},) tensor"}
    shapes |= {"rows": f"a ({like[1]}, D) tensor", "number": "a 0-dim tensor"}
    return " or ".join(shapes[shape] for shape in facts.shapes) or "a tensor"


def check_extras(extras: Mapping[str, Tensor] | None) -> None:
    """Raise TypeError unless these are tensors by name."""
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(f"extras must map names to tensors, got {type(extras).__name__}")
    for name, value in (extras or {}).items():
        if not isinstance(name, str):
            raise TypeError(
                f"extras must map names to tensors, got {type(name).__name__} {name!r}; name each "
                "by the objective's argument"
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"extras[{name!r}] must be a tensor, got {type(value).__name__}; "
                f"{conversion(value)}"
            )
