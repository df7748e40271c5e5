# SPDX-License-Identifier: Apache-2.0
"""What the caller means by an objective, as an ``Objective``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Objective, as_objective

# torch.compile cannot trace how an Objective is made, but takes one that lies in a global. What it
# compiled with one that has left its place since is compiled again.
MOST_KEPT = 64
_kept = SimpleNamespace()
_places = itertools.cycle(f"objective_{place}" for place in range(MOST_KEPT))


def configure(
    objective: str | Objective | Callable[..., Any],
    dp_group: dist.ProcessGroup | None,
    hyperparameters: Mapping[str, Any],
) -> Objective:
    """With the hyperparameters set, and the group where it takes one.

    Under torch.compile without those of one value a unit (``traced_units``).

    Raises as ``objectives.get`` does.
    """
    if not torch.compiler.is_compiling():
        return _configured(objective, dp_group, hyperparameters)
    # The dunder makes a constant of a number that is traced as a symbol; float() does not.
    constants = {
        name: value.__float__() if isinstance(value, float) else value
        for name, value in hyperparameters.items()
        if not isinstance(value, Tensor)
    }
    if isinstance(objective, Objective) and dp_group is None and not constants:
        return objective
    made: Objective = getattr(_kept, _keep(objective, dp_group, constants))
    return made


def traced_units(hyperparameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of one value a unit, where torch.compile traces them: no Objective can be made of them
    then, and they are given beside its extras."""
    if not torch.compiler.is_compiling():
        return {}
    return {name: one for name, one in hyperparameters.items() if isinstance(one, Tensor)}


def _keep(
    objective: str | Objective | Callable[..., Any],
    dp_group: dist.ProcessGroup | None,
    hyperparameters: Mapping[str, Any],
) -> str:
    """Where the objective lies now."""
    made = _configured(objective, dp_group, hyperparameters)
    for place, one in vars(_kept).items():
        if one == made:
            return place
    place = next(_places)
    setattr(_kept, place, made)
    return place


# All that torch.compiler.assume_constant_result does; but that imports torch._dynamo, a second of
# every import of fastpref.
_keep._dynamo_marked_constant = True  # type: ignore[attr-defined]


_PLAIN = frozenset({int, float, bool, str})


# Typed: 1 and True are equal.
@functools.lru_cache(maxsize=256, typed=True)
def _named(objective: str, names: tuple[str, ...], *values: Any) -> Objective:
    """Of an objective that is called by its name."""
    return as_objective(objective, **dict(zip(names, values, strict=True)))


def _configured(
    objective: str | Objective | Callable[..., Any],
    dp_group: dist.ProcessGroup | None,
    hyperparameters: Mapping[str, Any],
) -> Objective:
    values = hyperparameters.values()
    if isinstance(objective, str) and all(type(one) in _PLAIN for one in values):
        configured = _named(objective, tuple(hyperparameters), *values)
    else:
        configured = as_objective(objective, **hyperparameters)
    if dp_group is not None and "dp_group" in configured.signature.hyperparameters:
        own = configured.hyperparameters["dp_group"]
        if own is not None and own is not dp_group:
            raise ValueError(
                f"dp_group is given twice: {configured.name} has another one of its own; pass one"
            )
        configured = configured.replace(dp_group=dp_group)
    return configured
