# SPDX-License-Identifier: Apache-2.0
"""Frozen values as arguments of a registered operator, which takes numbers, strings and dtypes.

A field is declared once, in its dataclass or named tuple; what the operator's schema calls it, how
it is handed over and how it is put together again follow from its type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)

from .head import Sharding

T = TypeVar("T")


class Kind(NamedTuple):
    """A type of arguments."""

    schema: str
    put: Callable[[Any], Any] | None = None  # None: as it is
    take: Callable[[Any], Any] | None = None


def _name_of_sharding(sharding: Sharding | None) -> str | None:
    """One argument for both fields: a schema has 64 of them at most."""
    if sharding is None:
        return None
    return f"{'+' if sharding.reduces else '-'}{sharding.group.group_name}"


def _sharding_of_name(name: str | None) -> Sharding | None:
    resolve: Callable[[Any], dist.ProcessGroup] = _resolve_process_group
    return None if name is None else Sharding(resolve(name[1:]), name[0] == "+")


def _names(joined: str) -> tuple[str, ...]:
    return tuple(name for name in joined.split(",") if name)


_KINDS: dict[Any, Kind] = {
    bool: Kind("bool"),
    int: Kind("int"),
    float: Kind("float"),
    str: Kind("str"),
    int | None: Kind("int?"),
    float | None: Kind("float?"),
    torch.dtype: Kind("ScalarType"),
    tuple[str, ...]: Kind("str", ",".join, _names),
    Sharding | None: Kind("str?", _name_of_sharding, _sharding_of_name),
}


class _Entry(NamedTuple):
    path: tuple[str, ...]  # of attributes
    kind: Kind


class Settings(Generic[T]):
    """Of one class."""

    def __init__(self, cls: type[T], prefix: str = "") -> None:
        self.cls = cls
        self.entries = tuple(_entries(cls, ()))
        self.schema = ", ".join(
            f"{kind.schema} {prefix}{'_'.join(path)}" for path, kind in self.entries
        )

    def __len__(self) -> int:
        return len(self.entries)

    def put(self, value: T) -> tuple[Any, ...]:
        """The fields of ``value`` in the order of ``schema``."""
        found = []
        for path, kind in self.entries:
            one: Any = value
            for name in path:
                one = getattr(one, name)
            found.append(one if kind.put is None else kind.put(one))
        return tuple(found)

    def take(self, settings: tuple[Any, ...]) -> T:
        """The inverse of ``put``."""
        left = iter(settings)
        value: T = _made(self.cls, left)
        return value


def _fields(cls: type) -> Iterator[tuple[str, Any, bool]]:
    """Names, types, and whether these are classes with fields of their own. A callable is none of
    an operator's arguments and keeps its default."""
    for name, hint in get_type_hints(cls).items():
        nested = hasattr(hint, "__dataclass_fields__") or hasattr(hint, "_fields")
        if get_origin(hint) is Literal:
            hint = str
        if nested or hint in _KINDS:
            yield name, hint, nested


def _entries(cls: type, path: tuple[str, ...]) -> Iterator[_Entry]:
    for name, hint, nested in _fields(cls):
        if nested:
            yield from _entries(hint, (*path, name))
        else:
            yield _Entry((*path, name), _KINDS[hint])


def _made(cls: type, settings: Iterator[Any]) -> Any:
    given = {}
    for name, hint, nested in _fields(cls):
        if nested:
            given[name] = _made(hint, settings)
        else:
            value, take = next(settings), _KINDS[hint].take
            given[name] = value if take is None else take(value)
    return cls(**given)
