# SPDX-License-Identifier: Apache-2.0
"""Products of matrices, whether or not the processor multiplies in their dtype.

Without bfloat16 or float16 instructions torch multiplies such matrices up to a hundred times slower
than in float32. Blocks of them are cast then, multiplied in float32 within ``room`` bytes, and
rounded where a product in their own dtype would be. A room of 0 leaves products to torch.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .types import statistics_dtype
from .workspace import lease

PRODUCT_BYTES = 1 << 27  # at most, of what a product is before it adds up in a wider dtype
MOST_ROOM = 1 << 24  # larger blocks are no faster
LEAST_ROOM = 1 << 16
# A product of about a millisecond where it is fast; the second operand is read as in d hidden,
# which torch is slowest at.
TIMED = 64, 256, 1024
TIMED_ROUNDS = 3
# Times of two ways that are near each other must not choose one today and the other tomorrow.
SLOWER = 1.5


def room_bytes(budget: int) -> int:
    """For blocks in float32, of a memory budget."""
    return min(MOST_ROOM, max(LEAST_ROOM, budget // 4))


def multiply(a: Tensor, b: Tensor, out: Tensor, room: int) -> None:
    """out = a b, in the dtype of all three."""
    if room and a.numel() and b.numel():
        _in_blocks(out, a, b, True, room)
    else:
        torch.mm(a, b, out=out)


def product(a: Tensor, b: Tensor, room: int) -> Tensor:
    """a b, in the dtype of both."""
    out = a.new_empty((a.shape[0], b.shape[1]))
    multiply(a, b, out, room)
    return out


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool, room: int) -> None:
    """total = a b when ``first``, else total += a b; of the dtype of both or of the statistics'."""
    if room and a.numel() and b.numel():
        _in_blocks(total, a, b, first, room)
    elif total.dtype != a.dtype:
        rows = max(1, PRODUCT_BYTES // (b.shape[1] * b.itemsize))
        for part, own in zip(total.split(rows), a.split(rows), strict=True):
            one = torch.mm(own, b)
            part.copy_(one) if first else part.add_(one)
    elif first:
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _in_blocks(total: Tensor, a: Tensor, b: Tensor, first: bool, room: int) -> None:
    exact = statistics_dtype(a.dtype)
    (rows, inner), cols = a.shape, b.shape[1]
    m, k, n = block((rows, inner, cols), room // exact.itemsize)
    scratch = lease((m * k + k * n + 2 * m * n,), exact, a.device)
    left, right, sums, low = scratch.split([m * k, k * n, m * n, m * n])
    for at in split(0, cols, n):
        for own in split(0, rows, m):
            part = total[own, at]
            out = sums[: part.numel()].view(part.shape)
            for inside in split(0, inner, k):
                wide = _widened(a[own, inside], left), _widened(b[inside, at], right)
                if inside.start == 0:
                    torch.mm(*wide, out=out)
                else:
                    torch.addmm(out, *wide, out=out)
            if part.dtype != a.dtype:
                out = low.view(a.dtype)[: part.numel()].view(part.shape).copy_(out)
            part.copy_(out) if first else part.add_(out)


def _widened(matrix: Tensor, room: Tensor) -> Tensor:
    """Copied into ``room``, row by row or column by column as it lies."""
    if matrix.stride(0) < matrix.stride(1):
        return _widened(matrix.t(), room).t()
    return room[: matrix.numel()].view(matrix.shape).copy_(matrix)


def block(sizes: tuple[int, int, int], elements: int) -> tuple[int, int, int]:
    """Rows, inner and columns of blocks whose two operands, result and rounded result have no more
    ``elements``: as near to a cube as halving the largest of ``sizes`` comes, since each is cast
    once a block."""
    m, k, n = sizes
    while m * k + k * n + 2 * m * n > max(4, elements):
        largest = max(m, k, n)
        if k == largest:
            k = -(-k // 2)
        elif n == largest:
            n = -(-n // 2)
        else:
            m = -(-m // 2)
    return m, k, n


def cut(matrix: Tensor, rows: slice, columns: slice | None = None) -> Tensor:
    """``matrix[rows, columns]``, without a view of what is all of it."""
    if rows.start != 0 or rows.stop != matrix.shape[0]:
        matrix = matrix[rows]
    if columns is None or (columns.start == 0 and columns.stop == matrix.shape[1]):
        return matrix
    return matrix[:, columns]


def split(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(stop, at + size)) for at in range(start, stop, max(1, size))]


def slow_reason(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why products in ``dtype`` are better formed in float32, or None where they are not; found
    once a process."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return _slow_on_this_processor(dtype)


@functools.cache
def _slow_on_this_processor(dtype: torch.dtype) -> str | None:
    name = str(dtype).removeprefix("torch.")
    has = _has_instructions(dtype)
    if has is None:
        times = _slower_than_float32(dtype)
        return None if times < SLOWER else f"a product in {name} took {times:.1f} times as long"
    return None if has else f"this processor has no {name} instructions"


def _has_instructions(dtype: torch.dtype) -> bool | None:
    """What the processor says of itself; None where that does not settle it: it may emulate them,
    or have been told to leave some out."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None
    bf16 = dtype == torch.bfloat16
    library = torch.ops.mkldnn
    multiplies = library._is_mkldnn_bf16_supported if bf16 else library._is_mkldnn_fp16_supported
    if not multiplies():
        return False
    limited = {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & os.environ.keys()
    if bf16:
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        has = torch.cpu._is_amx_fp16_supported()
    return True if has and not limited else None


def _slower_than_float32(dtype: torch.dtype) -> float:
    """How many times as long a product takes as in float32 with all casts."""
    rows, inner, cols = TIMED
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        a, b = (
            torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, inner), (inner, cols))
        )
        out = torch.empty((rows, cols), dtype=dtype, device="cpu")
        ways = (
            lambda: torch.mm(a, b, out=out),
            lambda: out.copy_(torch.mm(a.float(), b.float())),
        )
        own, wide = (min(_seconds(way) for _ in range(1 + TIMED_ROUNDS)) for way in ways)
    return own / wide


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
