# SPDX-License-Identifier: Apache-2.0
"""The triton backend: products that leave the chip as exponentials (kernels/linear_exp.py).

It forms no tile of products where none is to be kept, and takes its sums from float32 logits
whatever the inputs. Needs no host sync.

The kernels read rows of hidden states and weights that start at multiples of 16 bytes and span as
many. Others (an odd H, a transposed weight, a head widened by the rank of a low-rank update that is
no multiple of 8) go through a tile of products and one pass in place, as float64 does: a copy with
padded rows would take the memory of the whole weight.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels import linear_exp, linear_grad, probabilities, reanchor, row_sums, tiles
from ..rows import Scored
from ..slab import Projection, Slab
from ..statistics import STATISTICS, RowSums, summed
from ..types import LogitMap
from ..workspace import row_stride
from . import RowBackend, UpstreamGradient, glue, next_tier, tiled
from .glue import scale_rows as scale_rows
from .glue import settle as settle
from .glue import target_logits as target_logits
from .torch import gradient_factors as gradient_factors

INTERPRETED = not isinstance(linear_exp.linear_exp_kernel, triton.JITFunction)
DTYPES = glue.DTYPES
_PIECE = 16  # bytes


def unavailable_reason(device_type: str) -> str | None:
    """Why these kernels cannot serve tensors on ``device_type``, or None when they can."""
    if INTERPRETED:
        return None if device_type == "cpu" else "Triton's interpreter is on: CPU tensors only"
    if device_type != "cuda":
        return f"the triton backend runs on CUDA tensors, got {device_type}; use backend='auto'"
    missing = glue.no_nvidia_gpu()
    if missing is not None:
        return missing
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return (
            f"its kernels need compute capability 8.0 or newer, got {capability}; "
            "use backend='auto'"
        )
    if tiles.chip_of(capability) is None:
        return (
            f"its kernels were not compiled for compute capability {capability} yet; "
            "use backend='auto'"
        )
    return None


def needs_tile(dtype: torch.dtype, write: bool) -> bool:
    return write or dtype not in DTYPES


def temporary_bytes(
    rows: int, cols: int, device_type: str, dtype: torch.dtype, statistics: bool
) -> int:
    """Most memory that a pass over a (rows, cols) tile takes beside it: partial sums, or where
    operands are not aligned a tile of some rows. Which one is the same on all ranks that share a
    plan, so it may not depend on how operands lie."""
    other = _in_place(device_type)
    if dtype not in DTYPES:
        return other.temporary_bytes(rows, cols, device_type, dtype, statistics)
    chip = _chip(None)
    # Of statistics the largest logit's column is kept beside them.
    kinds = 2 + len(STATISTICS) if statistics else 1
    narrowest = min(table[dtype.itemsize].ordinary.cols for table in (chip.plain, chip.heavy))
    col_tiles = -(-cols // narrowest)
    sums = 4 * glue.padded(rows) * (kinds * col_tiles + kinds + 3)
    some = min(rows, tiled.SPARE_ROWS)
    stride = row_stride(cols, dtype, torch.device(device_type))
    spare = some * stride * dtype.itemsize
    return max(sums, spare + other.temporary_bytes(some, cols, device_type, dtype, statistics))


def _in_place(device_type: str) -> RowBackend:
    """The backend for what these kernels do not do: one pass over a tile of products."""
    return next_tier("triton", device_type)[1]


def _takes(hidden: Tensor, weight: Tensor, tile: Tensor | None) -> bool:
    """Whether the kernels read these operands and write this tile."""
    return (
        hidden.dtype in DTYPES
        and _aligned(hidden)
        and _aligned(weight)
        and hidden.shape[1] * hidden.dtype.itemsize % _PIECE == 0
        # Tiles on a GPU lie so.
        and (INTERPRETED or tile is None or _aligned(tile))
    )


def score(projection: Projection, write: bool, statistics: bool, formed: bool) -> Scored | None:
    return None  # the products' kernel wants the targets' logits before


def project(projection: Projection, anchor: Tensor, write: bool, statistics: bool) -> RowSums:
    hidden, slab, tile, target = projection
    exps = tile if write else None
    if not _takes(hidden, slab.weight, exps):
        return _in_place(hidden.device.type).project(projection, anchor, write, statistics)
    return _Launches(hidden, slab, exps, target, statistics).run(anchor)


def exp_rows(projection: Projection, anchor: Tensor, write: bool, statistics: bool) -> RowSums:
    other = _in_place(projection.hidden.device.type)
    return other.exp_rows(projection, anchor, write, statistics)


def logit_grad(projection: Projection, upstream: UpstreamGradient) -> None:
    _in_place(projection.hidden.device.type).logit_grad(projection, upstream)


class _Launches:
    """The launches of one projection."""

    def __init__(
        self,
        hidden: Tensor,
        slab: Slab,
        exps: Tensor | None,
        target: Tensor,
        statistics: bool,
    ) -> None:
        self.hidden, self.slab, self.exps, self.target = hidden, slab, exps, target
        self.machine = _machine(hidden, statistics or slab.map.cap != 0)
        self.rows = hidden.shape[0]
        self.col_tiles = triton.cdiv(slab.weight.shape[0], self.machine.tiles.ordinary.cols)
        self.capped = statistics and slab.map.cap != 0
        kinds = 1 + len(summed(statistics, self.capped))
        self.stride = glue.padded(self.rows)
        shape = (kinds, self.col_tiles, self.stride)
        self.sums = target.new_empty(shape, dtype=torch.float32)
        self.out = self.sums.new_empty((kinds, self.stride))
        self.best_index = self.out_index = None
        if statistics:
            self.best_index = target.new_empty(shape[1:], dtype=torch.int32)
            self.out_index = target.new_empty(self.rows)

    def run(self, target_logit: Tensor) -> RowSums:
        # Flagged rows get another one here, and the target's logit is still needed.
        anchor = target_logit.clone()
        offset = torch.zeros_like(anchor)
        if self.rows:
            self._project(anchor)
            flag = anchor.new_empty(self.rows, dtype=torch.int8)
            row_sums.row_sums_kernel[(triton.cdiv(self.rows, row_sums.ROWS),)](
                self.sums,
                self.best_index,
                self.out,
                self.out_index,
                flag,
                self.col_tiles,
                self.stride,
                self.rows,
                BLOCK_ROWS=row_sums.ROWS,
                BLOCK_TILES=row_sums.TILES,
                CAPPED=self.capped,
            )
            self._reanchor(anchor, flag)
            if self.exps is not None and self.exps.dtype == torch.float16:
                self._exponentiate(self.exps, target_logit, anchor, offset)
        total, *statistics = self.out[:, : self.rows]
        return RowSums.of((anchor, total, offset, *statistics), self.out_index)

    def _project(self, anchor: Tensor) -> None:
        shape = self.machine.tiles.ordinary
        linear_exp.linear_exp_kernel[_grid(self.rows, self.slab.weight, self.machine)](
            *_operands(self.hidden, self.slab.weight, self.exps, self.machine),
            *self._arguments(anchor),
            self.rows,
            *_sizes(self.hidden, self.slab),
            **_whole_tiles(shape, self.machine),
            **self._flags(shape),
        )

    def _arguments(self, anchor: Tensor) -> tuple[Any, ...]:
        """What both kernels that write exponentials take after the operands."""
        return (
            _stride(self.exps),
            self.slab.bias,
            self.target,
            anchor,
            self.sums,
            self.best_index,
            self.stride,
        )

    def _flags(self, shape: tiles.TileShape) -> dict[str, Any]:
        blocks = _blocks(shape, self.hidden, self.slab.map)
        return blocks | _epilogue(shape, self.hidden, self.slab, self.exps)

    def _reanchor(self, anchor: Tensor, flag: Tensor) -> None:
        shape = self.machine.tiles.flagged
        weight, bias, map = self.slab
        sizes = _sizes(self.hidden, self.slab)
        flagged = flag.new_empty(self.rows, dtype=torch.int32)
        count = flag.new_empty(1, dtype=torch.int32)
        reanchor.list_flagged_kernel[(1,)](flag, flagged, count, self.rows, BLOCK=1024)
        grid = (self.machine.processors,)
        # The sums were added up: their place is free for the largest logits.
        reanchor.largest_logit_kernel[grid](
            self.hidden,
            weight,
            bias,
            self.target,
            flagged,
            count,
            self.sums,
            self.stride,
            *sizes,
            **_blocks(shape, self.hidden, map),
        )
        reanchor.anchor_kernel[grid](
            self.sums,
            flagged,
            count,
            anchor,
            self.col_tiles,
            self.stride,
            BLOCK_ROWS=row_sums.ROWS,
        )
        reanchor.reanchor_kernel[grid](
            self.hidden,
            weight,
            self.exps,
            *self._arguments(anchor),
            flagged,
            count,
            *sizes,
            **self._flags(shape),
        )
        reanchor.sum_flagged_kernel[grid](
            self.sums,
            self.best_index,
            flagged,
            count,
            self.out,
            self.out_index,
            self.col_tiles,
            self.stride,
            BLOCK_ROWS=row_sums.ROWS,
            BLOCK_TILES=row_sums.TILES,
            CAPPED=self.capped,
        )

    def _exponentiate(
        self, exps: Tensor, target_logit: Tensor, anchor: Tensor, offset: Tensor
    ) -> None:
        blocks = triton.cdiv(exps.shape[1], probabilities.COLS)
        probabilities.probabilities_kernel[(self.rows * blocks,)](
            exps,
            exps.stride(0),
            self.target,
            target_logit,
            anchor,
            self.out[0],
            offset,
            exps.shape[1],
            BLOCK_COLS=probabilities.COLS,
            ALIGNED=_aligned(exps),
        )


def project_gradient(projection: Projection, upstream: UpstreamGradient) -> None:
    hidden, slab, tile, target = projection
    weight, bias, map = slab
    if not _takes(hidden, weight, tile):
        _in_place(hidden.device.type).project_gradient(projection, upstream)
        return
    if tile is None or not tile.numel():
        return
    machine = _machine(hidden, heavy=True)
    shape = machine.tiles.ordinary
    linear_grad.linear_grad_kernel[_grid(hidden.shape[0], weight, machine)](
        *_operands(hidden, weight, tile, machine),
        _stride(tile),
        bias,
        target,
        *upstream,
        hidden.shape[0],
        *_sizes(hidden, slab),
        **_whole_tiles(shape, machine),
        **_blocks(shape, hidden, map),
        **_epilogue(shape, hidden, slab, tile),
    )


class _Machine(NamedTuple):
    tiles: tiles.Tiles
    descriptors: bool
    processors: int


def _machine(hidden: Tensor, heavy: bool) -> _Machine:
    """What serves this input. ``heavy``: with statistics, a cap or gradients in the epilogue."""
    chip = _chip(hidden.device)
    processors = 2 if INTERPRETED else _properties(hidden.device).multi_processor_count
    pair = (chip.heavy if heavy else chip.plain)[hidden.dtype.itemsize]
    if _exact(hidden) and _tf32_allowed():
        pair = tiles.in_tf32(pair)
    return _Machine(pair, chip.descriptors, processors)


def _chip(device: torch.device | None) -> tiles.Chip:
    """Of a CUDA device; None: the current one."""
    if INTERPRETED:
        return tiles.INTERPRETED
    properties = _properties(device or torch.device("cuda", torch.cuda.current_device()))
    chip = tiles.chip_of((properties.major, properties.minor))
    if chip is None:
        raise RuntimeError(f"no tiles for {device}, which unavailable_reason() refuses")
    return chip


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _grid(rows: int, weight: Tensor, machine: _Machine) -> tuple[int]:
    shape = machine.tiles.ordinary
    count = triton.cdiv(rows, shape.rows) * triton.cdiv(weight.shape[0], shape.cols)
    return (max(1, min(count, machine.processors * shape.resident)),)


def _operands(
    hidden: Tensor, weight: Tensor, tile: Tensor | None, machine: _Machine
) -> tuple[Any, ...]:
    """The matrices as the kernels take them."""
    if not machine.descriptors:
        return hidden, weight, tile
    shape = machine.tiles.ordinary
    blocks = (shape.rows, shape.width), (shape.cols, shape.width), (shape.rows, shape.slice_cols)
    return tuple(
        None if matrix is None else TensorDescriptor.from_tensor(matrix, list(block))
        for matrix, block in zip((hidden, weight, tile), blocks, strict=True)
    )


def _aligned(matrix: Tensor) -> bool:
    """Whether its rows are contiguous and start at multiples of 16 bytes."""
    starts = matrix.data_ptr(), matrix.stride(0) * matrix.dtype.itemsize
    return matrix.stride(1) == 1 and not any(start % _PIECE for start in starts)


def _stride(tile: Tensor | None) -> int:
    return 0 if tile is None else tile.stride(0)


def _sizes(hidden: Tensor, slab: Slab) -> tuple[int | float, ...]:
    """Sizes but the rows', strides and the logit map, in the order of the kernels' arguments."""
    weight, _, map = slab
    return (*weight.shape, hidden.stride(0), weight.stride(0), *glue.map_arguments(map))


def _blocks(shape: tiles.TileShape, hidden: Tensor, map: LogitMap) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": shape.rows,
        "BLOCK_COLS": shape.cols,
        "BLOCK_WIDTH": shape.width,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "maxnreg": shape.registers,
        "CAPPED": map.cap != 0,
        "PRECISION": "tf32" if _exact(hidden) and _tf32_allowed() else "ieee",
    }


def _whole_tiles(shape: tiles.TileShape, machine: _Machine) -> dict[str, Any]:
    return {
        "GROUP_ROWS": shape.group_rows,
        "FLATTEN": shape.flatten,
        "DESCRIPTORS": machine.descriptors,
    }


def _epilogue(
    shape: tiles.TileShape, hidden: Tensor, slab: Slab, tile: Tensor | None
) -> dict[str, Any]:
    return {
        "SLICES": shape.slices,
        # Beside a cap's arithmetic the mask does not count: one kernel less to compile.
        "RAGGED": slab.map.cap != 0 or slab.weight.shape[0] % shape.slice_cols != 0,
        "ALIGNED": tile is None or _aligned(tile),
        "EXACT": _exact(hidden),
    }


def _exact(hidden: Tensor) -> bool:
    """Whether logits are exact enough for the rounding of their differences to show."""
    return hidden.dtype == torch.float32


def _tf32_allowed() -> bool:
    """Torch's setting for products of float32. Since 2.9 there is a new one, which may be set for
    all of torch; the old one then may not be read."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"
