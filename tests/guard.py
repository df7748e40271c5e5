# SPDX-License-Identifier: Apache-2.0
"""Tensors on the CPU beside a page that nothing may touch: who reads or writes past their end, or
before their beginning, ends the process. For processes of their own."""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
SIDES = ("after", "before")


def unavailable_reason() -> str | None:
    return None if sys.platform == "linux" else "protects pages as Linux does"


def guarded(tensor: Tensor, side: str) -> Tensor:
    """A copy with the same strides, from its first element to its last: what lies between the rows
    is there (and holds NaN), what would follow the last row is not. The page on the other side is
    protected too, further away."""
    assert side in SIDES
    size = tensor.element_size() * extent(tensor)
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    # It keeps the mapping alive, and views of it do.
    space = torch.frombuffer(memory, dtype=torch.uint8)
    for page in (0, PAGE + room):
        _protect(space.data_ptr() + page)
    first = PAGE if side == "before" else PAGE + room - size
    held = space[first : first + size]
    held.fill_(0 if tensor.dtype == torch.bool else 0xFF)
    flat = held.view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset()).copy_(tensor)


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _protect(address: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


@contextmanager
def guarded_allocations(side: str, modules: tuple[str, ...]) -> Iterator[None]:
    """What ``modules`` allocate is guarded too."""

    def guarding(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_guarded(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return guarded(tensor, side) if caller.startswith(modules) else tensor

        return allocate_guarded

    makers = [(torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like", "full")]
    makers += [(Tensor, "new_empty"), (Tensor, "new_zeros"), (Tensor, "clone")]
    patches = [
        mock.patch.object(owner, name, guarding(getattr(owner, name))) for owner, name in makers
    ]
    for patch in patches:
        patch.start()
    yield
    for patch in patches:
        patch.stop()
