# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels that compare two models' rows: one each, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import cosine_rows
from ...kernels import divergence_rows as kernels
from ..slab import Products
from ..workspace import lease
from . import probe
from .divergence_formulas import DIVERGENCES, formula_rows
from .glue import map_arguments

FORWARD_KL = DIVERGENCES.index("forward_kl")
COSINE = DIVERGENCES.index("cosine")  # has a kernel of its own


def serves(
    tier: str,
    student: Products,
    teacher: Products,
    kind: int,
    write: bool,
) -> bool:
    """Whether the kernel has been seen right on this device."""
    tile, map = student.tile, student.map
    by_row = map.factor is not None
    if by_row and kind != FORWARD_KL:
        return False  # only that is asked for
    biases = student.bias is not None, teacher.bias is not None

    def check() -> str:
        generator = torch.Generator("cpu").manual_seed(0)
        cols = 2 * kernels.COLS + tile.shape[1] % 16
        random = torch.randn(6, cols, generator=generator, dtype=torch.float32, device="cpu")
        # Rows as far apart as those of a tile.
        own = lease(random.shape, tile.dtype, tile.device).copy_(random)
        expected = lease(random.shape, tile.dtype, tile.device).copy_(random)
        vectors = torch.randn(2, cols, generator=generator, dtype=torch.float32, device="cpu")
        vectors = vectors.to(tile.device)
        given = [one if there else None for one, there in zip(vectors, biases, strict=True)]
        factor = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float32, device=tile.device)
        of_rows = map._replace(factor=factor if by_row else None)

        def pair(both: Tensor) -> tuple[Products, Products]:
            return Products(both[:3], given[0], of_rows), Products(both[3:], given[1], of_rows)

        values = divergence_rows(*pair(own), kind, 0.5, write)
        name = DIVERGENCES[kind]
        right = formula_rows(*pair(expected), name, 0.5, write)
        found = [{"values": values, "gradients": own.float()}]
        found.append({"values": right, "gradients": expected.float()})
        return probe.differences(found, tile.dtype)

    even = tile.shape[1] % 16 == 0
    key = "divergence_rows", tile.dtype, even, biases, map.cap != 0, by_row, kind, write
    return probe.passes(tier, key, tile.device, check)


def divergence_rows(
    student: Products, teacher: Products, kind: int, beta: float, write: bool
) -> Tensor:
    """The operator fastpref::divergence_rows_, of float32, bfloat16 and float16 tiles."""
    known = len(DIVERGENCES)
    if not 0 <= kind < known:
        raise ValueError(f"kind must be in [0, {known}), got {kind}")
    tile, other = student.tile, teacher.tile
    values = tile.new_empty(tile.shape[0], dtype=torch.float32)
    if not tile.numel():
        return values.zero_()
    arguments = (
        tile,
        other,
        student.bias,
        teacher.bias,
        values,
        tile.shape[1],
        tile.stride(0),
        other.stride(0),
        *map_arguments(student.map),
    )
    flags = {
        "WRITE": write,
        "BLOCK_COLS": kernels.COLS,
        "CAPPED": student.map.cap != 0,
        "num_warps": kernels.WARPS,
        "maxnreg": kernels.REGISTERS,
    }
    grid = (values.numel(),)
    if kind == COSINE:
        cosine_rows.cosine_rows_kernel[grid](*arguments, **flags)
    else:
        kernels.divergence_rows_kernel[grid](
            *arguments,
            1 - beta,
            beta,
            KIND=kind,
            BY_ROW=student.map.factor is not None,
            EXACT=tile.dtype == torch.float32,
            **flags,
        )
    return values
