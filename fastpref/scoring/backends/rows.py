# SPDX-License-Identifier: Apache-2.0
"""The rows backend: torch's own products, then one pass over their rows in place by a Triton kernel
(kernels/exp_rows.py, kernels/logit_grad_rows.py). Needs no host sync."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ...kernels import exp_rows as exponentials
from ...kernels import join_shares, logit_grad_rows
from ..slab import Products
from ..statistics import STATISTICS, SUMS, RowSums, summed
from ..types import LogitMap
from . import UpstreamGradient, glue
from . import torch as torch_backend
from .glue import DTYPES
from .glue import scale_rows as scale_rows
from .glue import settle as settle
from .glue import target_logits as target_logits
from .torch import gradient_factors as gradient_factors

INTERPRETED = not isinstance(exponentials.exp_rows_kernel, triton.JITFunction)
# In the interpreter, which runs one program after the other: several steps in small tests.
INTERPRETED_PIECES = 16
WARPS = exponentials.WARPS
# A multiprocessor has enough to do with so many programs.
PROGRAMS = 2


def unavailable_reason(device_type: str) -> str | None:
    """Why these kernels cannot serve tensors on ``device_type``, or None when they can."""
    if INTERPRETED:
        return None if device_type == "cpu" else "Triton's interpreter is on: CPU tensors only"
    if device_type != "cuda":
        return f"the rows backend runs on CUDA tensors, got {device_type}; use backend='auto'"
    return glue.no_nvidia_gpu()


def temporary_bytes(
    rows: int, cols: int, device_type: str, dtype: torch.dtype, statistics: bool
) -> int:
    """Most memory that a pass over a (rows, cols) tile takes beside it: sums of shares."""
    if dtype not in DTYPES:
        return torch_backend.temporary_bytes(rows, cols, device_type, dtype, statistics)
    kinds = len(SUMS) + (len(STATISTICS) + 2 if statistics else 0)
    # Rows are only split where there are few.
    return 4 * kinds * (2 * glue.padded(rows) + 2 * PROGRAMS * 1024)


def exp_rows(
    products: Products, target: Tensor, anchor: Tensor, write: bool, statistics: bool
) -> RowSums:
    """As ``TileKernels.exp_rows``."""
    tile, bias, map = products
    if tile.dtype not in DTYPES or not tile.numel():
        return torch_backend.exp_rows(products, target, anchor, write, statistics)
    halves = write and tile.dtype == torch.float16
    rows = tile.shape[0]
    flags = _flags(tile, map)
    shares = _shares(tile, flags)
    joined = shares > 1 or halves
    kinds = len(SUMS) + len(summed(statistics, flags["CAPPED"]))
    stride = glue.padded(rows)
    sums = anchor.new_empty((kinds, shares, stride), dtype=torch.float32)
    best_index = target.new_empty((shares, stride)) if statistics else None
    settings = glue.map_arguments(map)
    exponentials.exp_rows_kernel[(rows * shares,)](
        tile,
        tile.stride(0),
        target,
        anchor,
        bias,
        sums,
        best_index,
        tile.shape[1],
        shares,
        stride,
        *settings,
        WRITE=write and not halves,
        STATISTICS=statistics,
        EXACT=tile.dtype == torch.float32,
        num_warps=WARPS,
        maxnreg=None if bias is None else exponentials.BIAS_REGISTERS,
        **flags,
    )
    out, out_index = sums[:, 0], None if best_index is None else best_index[0]
    if joined:
        out = sums.new_empty((kinds, stride))
        out_index = None if best_index is None else best_index.new_empty(stride)
        join_shares.join_shares_kernel[(rows * shares,)](
            tile,
            tile.stride(0),
            target,
            anchor,
            bias,
            sums,
            best_index,
            out,
            out_index,
            tile.shape[1],
            shares,
            stride,
            stride,
            *settings,
            WRITE=write,
            HALVES=halves,
            STATISTICS=statistics,
            MOST_SHARES=join_shares.MOST_SHARES,
            num_warps=WARPS,
            **flags,
        )
    return RowSums.of(out[:, :rows], None if out_index is None else out_index[:rows])


def logit_grad(products: Products, target: Tensor, upstream: UpstreamGradient) -> None:
    """As ``TileKernels.logit_grad``."""
    tile, bias, map = products
    if tile.dtype not in DTYPES or not tile.numel():
        torch_backend.logit_grad(products, target, upstream)
        return
    flags = _flags(tile, map)
    shares = _shares(tile, flags)
    logit_grad_rows.logit_grad_rows_kernel[(tile.shape[0] * shares,)](
        tile,
        tile.stride(0),
        target,
        *upstream,
        bias,
        tile.shape[1],
        shares,
        *glue.map_arguments(map),
        EXACT=tile.dtype == torch.float32,
        num_warps=WARPS,
        **flags,
    )


def _flags(tile: Tensor, map: LogitMap) -> dict[str, Any]:
    """What all three kernels are compiled for: the map, and how rows of ``tile`` are stepped
    through."""
    capped = map.cap != 0
    vector = 16 // tile.element_size()
    aligned = tile.stride(0) % vector == 0 and tile.data_ptr() % 16 == 0
    pieces = exponentials.CAPPED_PIECES if capped else exponentials.PIECES
    return {
        "CAPPED": capped,
        "BY_ROW": map.factor is not None,
        "PIECES": INTERPRETED_PIECES if INTERPRETED else pieces,
        "VECTOR": vector,
        "ALIGNED": aligned,
        "WHOLE": aligned and _is_padded(tile, vector),
    }


def _is_padded(tile: Tensor, vector: int) -> bool:
    """Whether rows have room for as many whole pieces as they need, as all tiles on a GPU have."""
    (rows, cols), stride = tile.shape, tile.stride(0)
    width = cols + -cols % vector
    last = tile.storage_offset() + (rows - 1) * stride + width
    return width <= stride and last * tile.element_size() <= tile.untyped_storage().nbytes()


def _shares(tile: Tensor, flags: dict[str, Any]) -> int:
    """Into how many programs' columns a row is split."""
    steps = triton.cdiv(tile.shape[1], flags["PIECES"] * flags["VECTOR"])
    wanted = triton.cdiv(PROGRAMS * _processors(tile.device), tile.shape[0])
    return max(1, min(int(wanted), int(steps), join_shares.MOST_SHARES))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
