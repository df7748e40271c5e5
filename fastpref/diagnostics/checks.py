# SPDX-License-Identifier: Apache-2.0
"""Checks that several diagnostics share; each error names the argument, what came, what was
expected and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import no_tensor
from ..objectives.reading import readable


def check_floats(dims: int, shape: str, *, finite: bool = True, **tensors: Any) -> None:
    """All floating-point, of ``dims`` dimensions and of one shape, which is called ``shape``, and
    finite where that can be seen without waiting for a device."""
    first = next(iter(tensors))
    for name, one in tensors.items():
        if not isinstance(one, Tensor):
            raise no_tensor(name, one)
        if not one.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {one.dtype}; use {name}.float()")
        if one.dim() != dims or 0 in one.shape:
            raise ValueError(f"{name} must be {shape}, none of it 0, got {tuple(one.shape)}")
        if one.shape != tensors[first].shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {tuple(tensors[first].shape)}, got "
                f"{tuple(one.shape)}; they belong to the same responses"
            )
        if finite:
            check_finite(name, one)


def check_finite(name: str, values: Tensor) -> None:
    """Where that can be seen without waiting for a device."""
    if readable(values) and not bool(values.isfinite().all()):
        place = tuple((~values.isfinite()).nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite, got {float(values[place])} at {place}; leave these out"
        )


def check_mask(name: str, mask: Any, shape: torch.Size) -> None:
    if not isinstance(mask, Tensor):
        raise no_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}; use {name}.bool()")
    if mask.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(mask.shape)}")


def check_batch(name: str, batch: Any) -> None:
    """Of a model of transformers, a mapping with token ids."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{name} must be a mapping with input_ids (B, T), got {type(batch).__name__}"
        )
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        got = ", ".join(map(str, batch)) if ids is None else type(ids).__name__
        raise ValueError(f"{name} must hold input_ids (B, T), a tensor, got {got or 'nothing'}")
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"{name}'s input_ids must be (B, T), got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}'s input_ids must be int64 or int32, got {ids.dtype}")


def wide(tensor: Tensor) -> Tensor:
    """In float64: of numbers of responses there are few."""
    return tensor.detach().to(torch.float64)
