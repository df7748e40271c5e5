# SPDX-License-Identifier: Apache-2.0
"""Large buffers that outlive a call, because a fresh one costs page faults (up to a third of a
product on CPU).

A leased tensor owns its buffer until the last tensor on its storage goes, that of an autograd
graph included; then the buffer returns to the pool. Idle buffers are there as long as one of the
last passes needed at least half of them: what one large step took is given back soon after, and
steps that alternate with a few of another kind find theirs again. All buffers together are never
more than what was lent at one time. On other devices torch's caching allocator already does this,
and a leased tensor is an ordinary one.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RECENT_PASSES = 32


@dataclass(slots=True, eq=False)
class _Buffer:
    memory: Tensor  # bytes
    needed: int  # the last pass that needed at least half of it

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    @property
    def is_recent(self) -> bool:
        return _passes - self.needed < RECENT_PASSES


# Reentrant: the garbage collector may end a lease inside the lists below, in the thread that holds
# the lock.
_lock = threading.RLock()
_idle: list[_Buffer] = []
_passes = 0


def row_stride(cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from one row of a tile to the next. Off the CPU, rows start at multiples of 16
    bytes, as wide loads, matrix units and the bulk copies of a GPU want them."""
    aligned = 1 if device.type == "cpu" else max(1, 16 // dtype.itemsize)
    return -(-cols // aligned) * aligned


def lease(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (rows, cols) or flat buffer, uninitialised."""
    # No view: its base would hold the memory when ``give_back`` empties it.
    return _lease(shape, dtype, device).data


def tile_of(workspace: Tensor, rows: int, columns: slice) -> Tensor:
    """(rows, columns) of a flat buffer."""
    cols = columns.stop - columns.start
    stride = row_stride(cols, workspace.dtype, workspace.device)
    return workspace[: rows * stride].view(rows, stride)[:, :cols]


def _lease(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        *rows, cols = shape
        stride = row_stride(cols, dtype, device)
        return torch.empty((*rows, stride), dtype=dtype, device=device)[..., :cols]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    buffer = _take(nbytes)
    # Of a storage of its own: detached tensors and views share that and may outlive any tensor.
    lent = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.memory.data_ptr())
    weakref.finalize(lent, _return, buffer).atexit = False
    # A tensor made in inference mode could not be written to outside it.
    with torch.inference_mode(False):
        return torch.frombuffer(lent, dtype=torch.uint8)[:nbytes].view(dtype).view(tuple(shape))


def _take(nbytes: int) -> _Buffer:
    """An idle buffer of at least ``nbytes``, the smallest, or a new one."""
    with _lock:
        fitting = [buffer for buffer in _idle if buffer.nbytes >= nbytes]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.nbytes)
            _idle.remove(best)
            if 2 * nbytes >= best.nbytes:
                best.needed = _passes
            return best
        # Idle buffers beside the new one would break the memory budget.
        _idle.clear()
    # A buffer made in inference mode could not be written to outside it.
    with torch.inference_mode(False):
        return _Buffer(torch.empty(nbytes, dtype=torch.uint8, device="cpu"), _passes)


def _return(buffer: _Buffer) -> None:
    with _lock:
        if buffer.is_recent:
            _idle.append(buffer)


def begin_pass() -> None:
    """Another forward pass: what none of the last ones needed goes."""
    global _passes
    with _lock:
        _passes += 1
        _idle[:] = [buffer for buffer in _idle if buffer.is_recent]


def give_back(tensor: Tensor) -> None:
    """The memory of a leased tensor, whoever holds it: it has no rows any more.

    Autograd saves the tensor itself, and takes no notice of where its data lies.
    """
    tensor.data = tensor.new_empty((0, *tensor.shape[1:]))


def release() -> None:
    """Return to the system the workspace that calls on CPU tensors left for the next ones, up to a
    call's memory budget.

    What an autograd graph still holds goes back to the pool with the graph. The next call takes its
    memory anew, at the cost of page faults. On other devices there is none: torch's caching
    allocator keeps such memory, see ``torch.cuda.empty_cache``.
    """
    with _lock:
        _idle.clear()
