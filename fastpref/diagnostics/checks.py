# SPDX-License-Identifier: Apache-2.0
"""Checks that several diagnostics share; each error names the argument, what came, what was
expected and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import no_tensor


def check_floats(dims: int, shape: str, **tensors: Any) -> None:
    """All floating-point, of ``dims`` dimensions and of one shape, which is called ``shape``."""
    first = next(iter(tensors))
    for name, one in tensors.items():
        if not isinstance(one, Tensor):
            raise no_tensor(name, one, "use torch.tensor()")
        if not one.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {one.dtype}; use {name}.float()")
        if one.dim() != dims or 0 in one.shape:
            raise ValueError(f"{name} must be {shape}, none of it 0, got {tuple(one.shape)}")
        if one.shape != tensors[first].shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {tuple(tensors[first].shape)}, got "
                f"{tuple(one.shape)}; they belong to the same responses"
            )


def check_mask(name: str, mask: Any, shape: torch.Size) -> None:
    if not isinstance(mask, Tensor):
        raise no_tensor(name, mask, "use torch.tensor()")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}; use {name}.bool()")
    if mask.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(mask.shape)}")


def wide(tensor: Tensor) -> Tensor:
    """In float64: of numbers of responses there are few."""
    return tensor.detach().to(torch.float64)
