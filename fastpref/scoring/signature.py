# SPDX-License-Identifier: Apache-2.0
"""The signature of a call: all that checks and plans look at, and no value that a tensor holds.

What follows from it is found once and kept for the next call of the same: a call of a hundred rows
takes as long to be checked as to be multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch

from .types import ScoringOptions
from .whole import PLAIN, is_whole

T = TypeVar("T")

_VALUES = frozenset({int, float, bool, str, ScoringOptions})


def signature_of(arguments: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """None where an argument is neither an ordinary tensor with data nor a plain value, such as a
    sharded parameter, a process group or a number of another library, or where something traces or
    transforms the call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    found: list[Any] = [torch.is_grad_enabled()]
    device = None
    for name, one in arguments.items():
        if one is None:
            continue
        kind = type(one)
        # The type beside the value: 1 and True are equal.
        if kind in _VALUES:
            found += name, kind, one
        elif kind in PLAIN and not one.is_meta and is_whole(one):
            device = one.device
            found += name, kind, one.shape, one.dtype, device, one.layout, one.requires_grad
        elif kind is tuple and _VALUES.issuperset(map(type, one)):
            found += name, *map(type, one), one
        else:
            return None
    if device is not None and torch.is_autocast_enabled(device.type):
        found.append(torch.get_autocast_dtype(device.type))
    return tuple(found)


class Kept(Generic[T]):
    """What was found for the latest signatures, ``most`` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._found: dict[tuple[Any, ...], T] = {}

    def of(self, signature: tuple[Any, ...] | None, find: Callable[[], T]) -> T:
        """``find()``, or what it returned for an equal signature; what it raises is not kept."""
        if signature is None:
            return find()
        found = self._found.get(signature)
        if found is None:
            found = find()
            if len(self._found) >= self.most:
                self.forget()
            self._found[signature] = found
        return found

    def forget(self) -> None:
        self._found.clear()
