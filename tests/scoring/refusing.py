# SPDX-License-Identifier: Apache-2.0
"""An allocator that refuses: tensors of at least some size are counted where they are made."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.scoring import workspace


class Refusing(TorchDispatchMode):
    """Raises torch.OutOfMemoryError in place of the tensors that ``refuses`` says, given how many
    there were before and the bytes of this one. Those below ``least`` bytes are not counted."""

    def __init__(self, refuses: Callable[[int, int], bool], least: int) -> None:
        super().__init__()
        self.refuses, self.least = refuses, least
        self.count = self.refused = 0
        self.leaked: list[str] = []
        self._made: list[tuple[str, weakref.ref[Tensor]]] = []
        self._failed = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = operation(*args, **(kwargs or {}))
        given = {_place(one) for one in _tensors((args, kwargs or {}))}
        for one in _tensors(found):
            if _place(one) in given or one.untyped_storage().nbytes() < self.least:
                continue
            if self._failed:
                self._look_for_leaks()
            index, self.count = self.count, self.count + 1
            if self.refuses(index, one.untyped_storage().nbytes()):
                self.refused += 1
                self._failed = True
                raise torch.OutOfMemoryError(f"no room for {operation} (a test)")
            self._made.append((f"{operation} {tuple(one.shape)}", weakref.ref(one)))
        return found

    def forget(self) -> None:
        """What was made so far, the caller's now."""
        self._made.clear()

    def _look_for_leaks(self) -> None:
        """When memory is asked for after a refusal, nothing is left of what was made before."""
        self._failed = False
        self.leaked += [name for name, one in self._made if one() is not None]
        self._made.clear()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Call(NamedTuple):
    """Both halves of a call, on inputs of their own."""

    forward: Callable[[], Any]
    backward: Callable[[Any], dict[str, Tensor]]  # of what ``forward`` returned


def run(call: Call, refuses: Callable[[int, int], bool], least: int) -> tuple[Refusing, Any]:
    """From an empty pool, and without the garbage collector: what goes, goes by itself."""
    mode = Refusing(refuses, least)
    workspace.release_workspace()
    gc.disable()
    try:
        with mode:
            found = call.forward()
        mode.forget()
        with mode:
            return mode, call.backward(found)
    finally:
        gc.enable()


def never(index: int, nbytes: int) -> bool:
    return False


def at(number: int) -> Callable[[int, int], bool]:
    """The tensor of that number, and no other."""
    return lambda index, nbytes: index == number


def above(limit: int) -> Callable[[int, int], bool]:
    return lambda index, nbytes: nbytes > limit


def each_refused(
    make: Callable[[], Call], least: int, most: int | None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The results with one tensor refused, each in turn; no more than ``most`` of them."""
    total = run(make(), never, least)[0].count
    assert total > 1, "nothing is counted"
    chosen = range(total)
    if most is not None and most < total:
        chosen = [round(at * (total - 1) / (most - 1)) for at in range(most)]
    for number in chosen:
        mode, found = run(make(), at(number), least)
        assert mode.refused == 1
        assert not mode.leaked, f"tensor {number} of {total} refused: {mode.leaked}"
        yield number, found
