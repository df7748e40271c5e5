# SPDX-License-Identifier: Apache-2.0
"""Large buffers that outlive a call, because a fresh one costs page faults (up to a third of a
product on CPU).

A leased tensor has its buffer until the last tensor on its storage goes, that of an autograd graph
included; then it is idle. Idle buffers are there as long as one of the last passes needed at least
half of them: what one large step took is given back soon after, and steps that alternate with a few
of another kind find theirs again. All buffers together are never more than what was lent at one
time. On other devices torch's caching allocator already does this, as that of the C library does
for little ones: there a leased tensor is an ordinary one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import AS_IT_IS

RECENT_PASSES = 32
# The allocator of the C library keeps smaller ones at hand itself.
LEAST = 1 << 16


@dataclass(slots=True, eq=False)
class _Buffer:
    memory: torch.UntypedStorage
    nbytes: int
    needed: int  # the last pass that needed at least half of it

    @property
    def is_idle(self) -> bool:
        """Whether no tensor lies in it."""
        # Nothing public says so. A finalizer on what was lent, the other way, takes three times as
        # long as the rest of a lease.
        count: int = torch._C._storage_Use_Count(self.memory._cdata)
        return count == 1

    @property
    def is_recent(self) -> bool:
        return _passes - self.needed < RECENT_PASSES


# Reentrant: the garbage collector may run anything inside the lists below.
_lock = threading.RLock()
_buffers: list[_Buffer] = []
_passes = 0


def _idle() -> list[_Buffer]:
    return [one for one in _buffers if one.is_idle]


def row_stride(cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from one row of a tile to the next. Off the CPU, rows start at multiples of 16
    bytes, as wide loads, matrix units and the bulk copies of a GPU want them."""
    aligned = 1 if device.type == "cpu" else max(1, 16 // dtype.itemsize)
    return -(-cols // aligned) * aligned


def lease(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (rows, cols) or flat buffer, uninitialised."""
    if device.type != "cpu":
        *rows, cols = shape
        stride = row_stride(cols, dtype, device)
        # No view: its base would hold the memory when ``give_back`` empties it.
        return torch.empty((*rows, stride), dtype=dtype, device=device)[..., :cols].data
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    # A tensor made in inference mode could not be written to outside it.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else AS_IT_IS, _lock:
        buffer = _take(nbytes)
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        tensor.set_(buffer.memory, 0, tuple(shape))  # type: ignore[call-overload]
        _buffers.append(buffer)
        return tensor


def tile_of(workspace: Tensor, rows: int, columns: slice) -> Tensor:
    """(rows, columns) of a flat buffer."""
    cols = columns.stop - columns.start
    stride = row_stride(cols, workspace.dtype, workspace.device)
    return workspace[: rows * stride].view(rows, stride)[:, :cols]


def _take(nbytes: int) -> _Buffer:
    """An idle buffer of at least ``nbytes``, the smallest, or a new one; it leaves the pool, where
    a finalizer that runs before a tensor lies in it could find it."""
    best = None
    for one in _buffers:
        if one.nbytes >= nbytes and (best is None or one.nbytes < best.nbytes) and one.is_idle:
            best = one
    if best is not None:
        if 2 * nbytes >= best.nbytes:
            best.needed = _passes
        _buffers.remove(best)
        return best
    # Idle buffers beside the new one would break the memory budget.
    _drop_idle()
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
    return _Buffer(memory, nbytes, _passes)


def _drop_idle() -> None:
    for one in _idle():
        _buffers.remove(one)


def begin_pass() -> None:
    """Another forward pass: what none of the last ones needed goes."""
    global _passes
    with _lock:
        _passes += 1
        # Lent ones too, which then go with what lies in them.
        _buffers[:] = [one for one in _buffers if one.is_recent]


def give_back(tensor: Tensor) -> None:
    """The memory of a leased tensor, whoever holds it: it has no rows any more.

    Autograd saves the tensor itself, and takes no notice of where its data lies.
    """
    tensor.data = tensor.new_empty((0, *tensor.shape[1:]))


def release_workspace() -> None:
    """Return to the system the workspace that calls on CPU tensors left for the next ones, up to a
    call's memory budget.

    What an autograd graph still holds goes back to the pool with the graph. The next call takes its
    memory anew, at the cost of page faults. On other devices there is none: torch's caching
    allocator keeps such memory, see ``torch.cuda.empty_cache``.
    """
    with _lock:
        _drop_idle()
