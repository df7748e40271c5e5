# SPDX-License-Identifier: Apache-2.0
"""What compares two models' rows: the compiled operator (csrc/cpu/divergence_rows.inl), a Triton
kernel (divergence_launch.py), or plain torch (divergence_formulas.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..slab import Products
from ..vocab_parallel import THIS_RANK, Columns
from .divergence_formulas import (
    DIVERGENCES,
    TEMPORARIES,
    block_elements,
    formula_dtype,
    formula_rows,
)


def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` has no divergences, or None when it has."""
    if backend == "cuda":
        return "the cuda backend has no divergences; use backend='auto' or 'torch'"
    return None


def temporary_bytes(
    rows: int,
    cols: int,
    device_type: str,
    dtype: torch.dtype,
    backend: str,
    in_torch: bool = False,
    sharded: bool = False,
) -> int:
    """Most memory that a pass over two (rows, cols) tiles takes beside them; ``in_torch`` where
    more is made of their logits than a divergence, ``sharded`` over the vocabulary."""
    exact = formula_dtype(dtype).itemsize
    if not sharded and not in_torch and _row_by_row(backend, dtype):
        # In C++ each thread holds the exponentials of a row of both.
        return 2 * cols * exact * min(rows, torch.get_num_threads()) if backend == "cpp" else 0
    block = max(cols, min(rows * cols, block_elements(device_type)))
    if sharded:
        block = rows * cols
    return TEMPORARIES * block * exact


def _row_by_row(backend: str, dtype: torch.dtype) -> bool:
    """Whether a kernel forms what lies between tile and result row by row."""
    return backend == "cpp" or (backend in ("triton", "rows") and dtype != torch.float64)


def divergence_rows(
    student: Products,
    teacher: Products,
    divergence: str,
    beta: float,
    write: bool,
    backend: str,
    columns: Columns = THIS_RANK,
) -> Tensor:
    """(rows,) in the statistics' dtype; with ``write`` the student's tile becomes dD / d(raw
    product). Of sharded heads plain torch does it, which has collectives on its way."""
    if columns.group is None and _row_by_row(backend, student.tile.dtype):
        kind = DIVERGENCES.index(divergence)
        if backend == "cpp":
            tiles = student.tile, teacher.tile, student.bias, teacher.bias
            value: Tensor = torch.ops.fastpref.divergence_rows_(
                *tiles, *student.map, kind, beta, write
            )
            return value
        from . import divergence_launch

        if divergence_launch.serves(backend, student, teacher, kind, write):
            return divergence_launch.divergence_rows(student, teacher, kind, beta, write)
    return formula_rows(student, teacher, divergence, beta, write, columns)
