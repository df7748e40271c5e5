# SPDX-License-Identifier: Apache-2.0
"""What arguments are told apart by, everywhere in the package: numbers, integers, known names,
tensors and process groups."""

import difflib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
import torch.distributed as dist


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a real number, also a scalar of numpy; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is an integer, also a scalar of numpy; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def flag(name: str, value: Any) -> bool:
    """``value``, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def as_python(value: Any) -> Any:
    """A number as Python's own, so that 1 / (2 beta) is float64's whatever came; all else as it
    is."""
    if type(value) in (int, float) or not is_number(value):
        return value
    return int(value) if is_integer(value) else float(value)


def closest(
    name: Any, known: Iterable[str], meant: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Those of ``known`` that ``name`` may stand for, the likeliest first; case and punctuation do
    not count. ``meant`` has names from elsewhere, by which of ``known`` they mean."""
    if not isinstance(name, str):
        return ()
    folded = {_folded(other): one for other, one in (meant or {}).items()}
    folded |= {_folded(one): one for one in known}
    if _folded(name) in folded:
        return (folded[_folded(name)],)
    found = difflib.get_close_matches(_folded(name), folded)
    return tuple(dict.fromkeys(folded[one] for one in found))


def hint(name: Any, known: Iterable[str], meant: Mapping[str, str] | None = None) -> str:
    """The end of a message about a name that is not known: which one it may stand for."""
    found = closest(name, known, meant)
    return f"; did you mean {found[0]!r}?" if found else ""


def _folded(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def no_tensor(name: str, value: Any, remedy: str = "") -> TypeError:
    """Of an argument that must be a tensor, and is a ``value`` that is none; by default the remedy
    is to make it one."""
    if isinstance(value, torch.nn.Module):
        remedy = f"pass its .{'bias' if name.endswith('bias') else 'weight'}"
    got = f"{name} must be a torch.Tensor, got {type(value).__name__}"
    return TypeError(f"{got}; {remedy or conversion(value)}")


def conversion(value: Any) -> str:
    """What makes a tensor of ``value``, for the end of a message."""
    kind = type(value)
    is_array = (kind.__module__, kind.__name__) == ("numpy", "ndarray")
    return "use torch.from_numpy()" if is_array else "use torch.tensor()"


def check_group(group: Any, name: str) -> None:
    """Raise TypeError unless it is a process group, or none."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}; of a device mesh, pass mesh.get_group()"
        )
