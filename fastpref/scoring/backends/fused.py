# SPDX-License-Identifier: Apache-2.0
"""The triton backend: products that leave the chip as exponentials (kernels/linear_exp.py).

It forms no tile of products where none is to be kept, and takes its sums from float32 logits
whatever the inputs. Needs no host sync.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels import linear_exp, linear_grad, probabilities, reanchor, row_sums, tiles
from .. import rows
from ..rows import RowScores, RowSums, TargetLogits
from ..types import LogitMap
from . import RowBackend, UpstreamGradient, compiled, cuda, glue, plain
from .tiled import Tiled

INTERPRETED = not isinstance(linear_exp.linear_exp_kernel, triton.JITFunction)
DTYPES = glue.DTYPES


def unavailable_reason(device_type: str) -> str | None:
    """Why these kernels cannot serve tensors on ``device_type``, or None when they can."""
    if INTERPRETED:
        return None if device_type == "cpu" else "Triton's interpreter is on: CPU tensors only"
    if device_type != "cuda":
        return f"the triton backend runs on CUDA tensors, got {device_type}; use backend='auto'"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"its kernels need compute capability 8.0 or newer, got {capability}"
    return None


def needs_tile(dtype: torch.dtype, write: bool) -> bool:
    return write or dtype not in DTYPES


def temporary_bytes(
    rows: int, cols: int, device_type: str, dtype: torch.dtype, statistics: bool
) -> int:
    """Most memory that a pass over a (rows, cols) tile takes beside it: partial sums."""
    if dtype not in DTYPES:
        other = _in_place(device_type)
        return other.temporary_bytes(rows, cols, device_type, dtype, statistics)
    kinds = linear_exp.KINDS + 1 if statistics else 1
    slices = -(-cols // (16 if INTERPRETED else tiles.LEAST_SLICE))
    return 4 * rows * (kinds * slices + kinds + 3)


def _in_place(device_type: str) -> RowBackend:
    """The backend for what these kernels do not do: one pass over a tile of products."""
    return Tiled(compiled if cuda.unavailable_reason(device_type) is None else plain)


def project(
    hidden: Tensor,
    weight: Tensor,
    tile: Tensor | None,
    target: Tensor,
    anchor: Tensor,
    bias: Tensor | None,
    map: LogitMap,
    write: bool,
    statistics: bool,
) -> RowSums:
    if hidden.dtype not in DTYPES:
        other = _in_place(hidden.device.type)
        return other.project(hidden, weight, tile, target, anchor, bias, map, write, statistics)
    return _Projection(hidden, weight, tile if write else None, target, bias, map, statistics).run(
        anchor
    )


class _Projection:
    """The launches of one projection."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        exps: Tensor | None,
        target: Tensor,
        bias: Tensor | None,
        map: LogitMap,
        statistics: bool,
    ) -> None:
        self.hidden, self.weight, self.exps = hidden, weight, exps
        self.target, self.bias, self.map = target, bias, map
        self.machine = _machine(hidden, statistics or map.cap != 0)
        self.rows = hidden.shape[0]
        self.slices = triton.cdiv(weight.shape[0], self.machine.tiles.ordinary.slice_cols)
        kinds = linear_exp.KINDS if statistics else 1
        self.sums = target.new_empty((kinds, self.slices, self.rows), dtype=torch.float32)
        self.out = self.sums.new_empty((kinds, self.rows))
        self.best_index = self.out_index = None
        if statistics:
            self.best_index = target.new_empty((self.slices, self.rows), dtype=torch.int32)
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
                self.slices,
                self.rows,
                BLOCK_ROWS=row_sums.ROWS,
                BLOCK_TILES=row_sums.TILES,
            )
            self._reanchor(anchor, flag)
            if self.exps is not None and self.exps.dtype == torch.float16:
                self._exponentiate(self.exps, target_logit, anchor, offset)
        if self.out_index is None:
            return RowSums(anchor, self.out[0], offset)
        best, weighted, squares, total = self.out[1:]
        return RowSums(anchor, self.out[0], offset, best, self.out_index, weighted, squares, total)

    def _project(self, anchor: Tensor) -> None:
        shape = self.machine.tiles.ordinary
        operands, described = _operands(self.hidden, self.weight, self.exps, self.machine)
        linear_exp.linear_exp_kernel[_grid(self.rows, self.weight, self.machine)](
            *operands,
            _stride(self.exps),
            self.bias,
            self.target,
            anchor,
            self.sums,
            self.best_index,
            *_sizes(self.hidden, self.weight, self.map),
            GROUP_ROWS=shape.group_rows,
            DESCRIPTORS=described,
            SLICES=shape.slices,
            EXACT=_exact(self.hidden),
            **_blocks(shape),
            **_flags(self.hidden, self.map),
        )

    def _reanchor(self, anchor: Tensor, flag: Tensor) -> None:
        shape = self.machine.tiles.flagged
        blocks = _blocks(shape) | _flags(self.hidden, self.map)
        sizes = _sizes(self.hidden, self.weight, self.map)
        flagged = flag.new_empty(self.rows, dtype=torch.int32)
        count = flag.new_empty(1, dtype=torch.int32)
        reanchor.list_flagged_kernel[(1,)](flag, flagged, count, self.rows, BLOCK=1024)
        grid = (self.machine.processors,)
        col_tiles = triton.cdiv(self.weight.shape[0], shape.cols)
        # The sums were added up: their place is free for the largest logits.
        reanchor.largest_logit_kernel[grid](
            self.hidden,
            self.weight,
            self.bias,
            self.target,
            flagged,
            count,
            self.sums,
            *sizes,
            **blocks,
        )
        reanchor.anchor_kernel[grid](
            self.sums, flagged, count, anchor, col_tiles, self.rows, BLOCK_ROWS=row_sums.ROWS
        )
        reanchor.reanchor_kernel[grid](
            self.hidden,
            self.weight,
            self.exps,
            _stride(self.exps),
            self.bias,
            self.target,
            anchor,
            self.sums,
            self.best_index,
            flagged,
            count,
            *sizes,
            SLICES=shape.slices,
            EXACT=_exact(self.hidden),
            **blocks,
        )
        reanchor.settle_kernel[grid](
            self.sums,
            self.best_index,
            flagged,
            count,
            self.out,
            self.out_index,
            self.slices,
            self.rows,
            BLOCK_ROWS=row_sums.ROWS,
            BLOCK_TILES=row_sums.TILES,
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


def project_gradient(
    hidden: Tensor,
    weight: Tensor,
    tile: Tensor,
    target: Tensor,
    upstream: UpstreamGradient,
    bias: Tensor | None,
    map: LogitMap,
) -> None:
    if hidden.dtype not in DTYPES:
        other = _in_place(hidden.device.type)
        other.project_gradient(hidden, weight, tile, target, upstream, bias, map)
        return
    if not tile.numel():
        return
    machine = _machine(hidden, heavy=True)
    shape = machine.tiles.ordinary
    operands, described = _operands(hidden, weight, tile, machine)
    linear_grad.linear_grad_kernel[_grid(hidden.shape[0], weight, machine)](
        *operands,
        _stride(tile),
        bias,
        target,
        *upstream,
        *_sizes(hidden, weight, map),
        GROUP_ROWS=shape.group_rows,
        SLICES=shape.slices,
        DESCRIPTORS=described,
        EXACT=_exact(hidden),
        **_blocks(shape),
        **_flags(hidden, map),
    )


class _Machine(NamedTuple):
    tiles: tiles.Tiles
    descriptors: bool
    processors: int


def _machine(hidden: Tensor, heavy: bool) -> _Machine:
    """What serves this input. ``heavy``: with statistics, a cap or gradients in the epilogue."""
    chip, processors = tiles.INTERPRETED, 2
    if not INTERPRETED:
        properties = _properties(hidden.device)
        chip = tiles.chip_of((properties.major, properties.minor))
        processors = properties.multi_processor_count
    table = chip.heavy if heavy else chip.plain
    return _Machine(table[hidden.dtype.itemsize], chip.descriptors, processors)


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _grid(rows: int, weight: Tensor, machine: _Machine) -> tuple[int]:
    shape = machine.tiles.ordinary
    count = triton.cdiv(rows, shape.rows) * triton.cdiv(weight.shape[0], shape.cols)
    return (max(1, min(count, machine.processors * shape.resident)),)


def _operands(
    hidden: Tensor, weight: Tensor, tile: Tensor | None, machine: _Machine
) -> tuple[tuple[Any, ...], bool]:
    """The matrices as the kernels take them, and whether that is by descriptors."""
    matrices = (hidden, weight, tile)
    described = machine.descriptors and all(
        _describable(one) for one in matrices if one is not None
    )
    if not described:
        return matrices, False
    shape = machine.tiles.ordinary
    return (
        _describe(hidden, shape.rows, shape.width),
        _describe(weight, shape.cols, shape.width),
        None if tile is None else _describe(tile, shape.rows, shape.slice_cols),
    ), True


def _describable(matrix: Tensor) -> bool:
    """Whether the copy engine takes it: 16-byte aligned rows."""
    return matrix.stride(1) == 1 and _aligned(matrix) and min(matrix.shape) > 0


def _aligned(matrix: Tensor) -> bool:
    row = matrix.stride(0) * matrix.dtype.itemsize
    return row % 16 == 0 and matrix.data_ptr() % 16 == 0


def _describe(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, cols])


def _stride(tile: Tensor | None) -> int:
    return 0 if tile is None else tile.stride(0)


def _sizes(hidden: Tensor, weight: Tensor, map: LogitMap) -> tuple[int | float, ...]:
    """Sizes, strides and the logit map, in the order of the kernels' arguments."""
    sizes = (hidden.shape[0], *weight.shape)
    strides = (*hidden.stride(), *weight.stride())
    return (*sizes, *strides, map.scale, map.scale / map.cap if map.cap else 0.0, map.cap)


def _blocks(shape: tiles.TileShape) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": shape.rows,
        "BLOCK_COLS": shape.cols,
        "BLOCK_WIDTH": shape.width,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def _flags(hidden: Tensor, map: LogitMap) -> dict[str, Any]:
    tf32 = _exact(hidden) and not INTERPRETED and torch.backends.cuda.matmul.allow_tf32
    return {"CAPPED": map.cap != 0, "PRECISION": "tf32" if tf32 else "ieee"}


def _exact(hidden: Tensor) -> bool:
    """Whether logits are exact enough for the rounding of their differences to show."""
    return hidden.dtype == torch.float32


def target_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, map: LogitMap
) -> TargetLogits:
    if glue.matrices_supported(hidden, weight) is not None:
        other = _in_place(hidden.device.type)
        return other.target_logits(hidden, weight, target, bias, map)
    return glue.target_logits(hidden, weight, target, bias, map)


def settle(
    sums: RowSums, own: TargetLogits, exps: Tensor | None, map: LogitMap
) -> tuple[RowScores, Tensor]:
    if sums.sum.dtype != torch.float32:
        return rows.settle(sums, own, exps, map)
    return glue.settle(sums, own, exps, map)


def scale_rows(rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    if glue.matrices_supported(rows, out) is not None:
        return plain.scale_rows(rows, factor, out)
    return glue.scale_rows(rows, factor, out)
