# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels that compare two models' rows: one each, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import cosine_rows
from ...kernels import divergence_rows as kernels
from ..types import LogitMap
from ..workspace import lease
from . import divergences, probe
from .glue import map_arguments

KINDS = 6
COSINE = 5  # has a kernel of its own


def serves(
    tier: str,
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    map: LogitMap,
    kind: int,
    write: bool,
) -> bool:
    """Whether the kernel has been seen right on this device."""
    biases = student_bias is not None, teacher_bias is not None

    def check() -> str:
        generator = torch.Generator("cpu").manual_seed(0)
        cols = 2 * kernels.COLS + student.shape[1] % 16
        random = torch.randn(6, cols, generator=generator, dtype=torch.float32, device="cpu")
        # Rows as far apart as those of a tile.
        own = lease(random.shape, student.dtype, student.device).copy_(random)
        expected = lease(random.shape, student.dtype, student.device).copy_(random)
        vectors = torch.randn(2, cols, generator=generator, dtype=torch.float32, device="cpu")
        vectors = vectors.to(student.device)
        given = (vectors[0] if biases[0] else None), (vectors[1] if biases[1] else None)
        values = divergence_rows(own[:3], own[3:], *given, map, kind, 0.5, write)
        name = divergences.KINDS[kind]
        right = divergences.formula_rows(expected[:3], expected[3:], *given, map, name, 0.5, write)
        found = [{"values": values, "gradients": own.float()}]
        found.append({"values": right, "gradients": expected.float()})
        return probe.differences(found, student.dtype)

    even = student.shape[1] % 16 == 0
    key = "divergence_rows", student.dtype, even, biases, map.cap != 0, kind, write
    return probe.passes(tier, key, student.device, check)


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    map: LogitMap,
    kind: int,
    beta: float,
    write: bool,
) -> Tensor:
    """The operator fastpref::divergence_rows_, of float32, bfloat16 and float16 tiles."""
    if not 0 <= kind < KINDS:
        raise ValueError(f"kind must be in [0, {KINDS}), got {kind}")
    values = student.new_empty(student.shape[0], dtype=torch.float32)
    if not student.numel():
        return values.zero_()
    arguments = (
        student,
        teacher,
        student_bias,
        teacher_bias,
        values,
        student.shape[1],
        student.stride(0),
        teacher.stride(0),
        *map_arguments(map),
    )
    flags = {"WRITE": write, "BLOCK_COLS": kernels.COLS, "CAPPED": map.cap != 0}
    grid = (values.numel(),)
    if kind == COSINE:
        cosine_rows.cosine_rows_kernel[grid](*arguments, **flags, num_warps=kernels.WARPS)
    else:
        kernels.divergence_rows_kernel[grid](
            *arguments,
            1 - beta,
            beta,
            KIND=kind,
            EXACT=student.dtype == torch.float32,
            **flags,
            num_warps=kernels.WARPS,
        )
    return values
