# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels of squared errors (kernels/squared_errors.py), without a host
sync."""

from __future__ import annotations

import contextlib
import logging
from typing import TypeAlias

import torch
import triton
from torch import Tensor

from ...kernels import squared_errors as kernels
from . import exact_dtype, plain

logger = logging.getLogger("fastpref")

INTERPRETED = not isinstance(kernels.squared_errors_kernel, triton.JITFunction)
# Programs that fill a GPU, whichever: the order of additions is the same on all.
_PROGRAMS = 1024


_Kind: TypeAlias = tuple[torch.device, tuple[torch.dtype, ...], bool]
_passed: dict[_Kind, bool] = {}


def serves(device: torch.device, dtypes: tuple[torch.dtype, ...], masked: bool) -> bool:
    """Whether the kernels run there. Those of each kind are compared with torch's once, which waits
    for the device, and never while a graph is being captured."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    kind = device, dtypes, masked
    if kind not in _passed:
        if torch.cuda.is_current_stream_capturing():
            return False
        _passed[kind] = _passes(kind)
    return _passed[kind]


def _passes(kind: _Kind) -> bool:
    try:
        with torch.no_grad():
            wrong = _difference(*kind)
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernels
    except Exception as error:  # whatever compiler, driver and launch raise
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        logger.warning(
            "fastpref's Triton kernels of squared errors do not serve %s (%s); plain torch does "
            "instead, right but slower",
            kind[0],
            wrong.strip().splitlines()[-1][:300],
        )
    return not wrong


def _difference(device: torch.device, dtypes: tuple[torch.dtype, ...], masked: bool) -> str:
    """What is wrong on whole numbers, whose sums are exact."""
    shape = 3, 1, 3 * kernels.ELEMENTS + 16
    whole = torch.arange(3 * shape[2], device=device, dtype=torch.int64).view(shape)
    model, target, *ref = (
        (whole * step).fmod(5).to(dtype) for step, dtype in zip((1, 2, 3), dtypes, strict=False)
    )
    mask = whole.fmod(3) != 0 if masked else None
    given = model, ref[0] if ref else None, target, mask, 2
    for own, other in zip(squared_errors(*given), plain.squared_errors(*given), strict=True):
        if not torch.equal(own, other):
            return "sums differ from torch's"
    factor = torch.tensor([1.0, -2.0, 0.5], dtype=exact_dtype(*given[:3]), device=device)
    found, expected = torch.empty_like(model), torch.empty_like(model)
    error_gradient(found, model, target, mask, factor)
    plain.error_gradient(expected, model, target, mask, factor)
    return "" if torch.equal(found, expected) else "gradients differ from torch's"


def squared_errors(
    model: Tensor, ref: Tensor | None, target: Tensor, mask: Tensor | None, divisor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As plain.squared_errors."""
    samples, pieces, length = model.shape
    block = _block(pieces, length)
    tiles = triton.cdiv(pieces, block[0]) * triton.cdiv(length, block[1])
    parts, part_tiles = _parts(samples, tiles)
    exact = exact_dtype(model, ref, target)
    sums = torch.empty((kernels.SUMS, samples, parts), dtype=exact, device=model.device)
    with _on(model.device):
        kernels.squared_errors_kernel[(samples * parts,)](
            model,
            ref,
            target,
            _bytes(mask),
            sums,
            samples,
            pieces,
            length,
            parts,
            part_tiles,
            tiles,
            divisor if parts == 1 else 1,
            *model.stride()[:2],
            *((0, 0) if ref is None else ref.stride()[:2]),
            *target.stride()[:2],
            *((0, 0, 0) if mask is None else mask.stride()),
            BLOCK_PIECES=block[0],
            BLOCK_LENGTH=block[1],
            num_warps=kernels.WARPS,
        )
        if parts > 1:
            parts_of, sums = sums, sums.new_empty((kernels.SUMS, samples))
            kernels.join_parts_kernel[(kernels.SUMS * samples,)](
                parts_of, sums, parts, divisor, BLOCK_PARTS=kernels.MOST_PARTS
            )
    gap, error, reference = sums.view(kernels.SUMS, samples).unbind()
    if ref is None:
        return error.new_empty(0), error, error.new_empty(0)
    return gap, error, reference


def error_gradient(
    out: Tensor, model: Tensor, target: Tensor, mask: Tensor | None, factor: Tensor
) -> None:
    """As plain.error_gradient."""
    samples, pieces, length = model.shape
    block = _block(pieces, length)
    tiles = triton.cdiv(pieces, block[0]) * triton.cdiv(length, block[1])
    with _on(model.device):
        kernels.error_gradient_kernel[(samples * tiles,)](
            model,
            target,
            _bytes(mask),
            factor,
            out,
            pieces,
            length,
            tiles,
            *model.stride()[:2],
            *target.stride()[:2],
            *((0, 0, 0) if mask is None else mask.stride()),
            *out.stride()[:2],
            BLOCK_PIECES=block[0],
            BLOCK_LENGTH=block[1],
            num_warps=kernels.WARPS,
        )


def _block(pieces: int, length: int) -> tuple[int, int]:
    """Pieces and elements of a tile: long pieces one by one, short ones together."""
    if pieces == 1:
        return 1, kernels.ELEMENTS
    wide = min(kernels.ELEMENTS, triton.next_power_of_2(length))
    return kernels.ELEMENTS // wide, wide


def _parts(samples: int, tiles: int) -> tuple[int, int]:
    """How many programs share a sample, and the tiles of each."""
    most = min(kernels.MOST_PARTS, triton.cdiv(_PROGRAMS, samples), triton.cdiv(tiles, 2))
    part_tiles = triton.cdiv(tiles, max(1, most))
    return triton.cdiv(tiles, part_tiles), part_tiles


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
