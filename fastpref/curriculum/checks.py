# SPDX-License-Identifier: Apache-2.0
"""What the tools of this package ask of their arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import is_integer, is_number, no_tensor
from ..objectives.reading import readable


def numbers(name: str, value: Any, dims: str) -> Tensor:
    """``value`` detached in float32, float64 where it is that; ``dims`` as in "(M, P)".

    That they are numbers is seen on a CPU only; elsewhere it would wait for the device.
    """
    found = tensor(name, value, dims)
    if found.dtype == torch.bool or found.is_complex():
        raise TypeError(f"{name} must be real numbers, got {found.dtype}")
    wide = found.detach()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    if readable(wide) and bool(wide.isnan().any()):
        place = tuple(wide.isnan().nonzero()[0].tolist())
        raise ValueError(f"{name} must hold no NaN, got one at {place}; leave these rows out")
    return wide


def tensor(name: str, value: Any, dims: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise no_tensor(name, value)
    count = dims.count(",") + (not dims.endswith(",)"))
    if value.dim() != count:
        raise ValueError(f"{name} must be {dims}, got {tuple(value.shape)}")
    return value


def integers(name: str, value: Any, dims: str) -> Tensor:
    found = tensor(name, value, dims)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {found.dtype}")
    return found.detach()


def marks(name: str, value: Any, like: str, shape: torch.Size) -> Tensor:
    """A bool or integer tensor of this shape, nonzero = true, as bool."""
    if not isinstance(value, Tensor):
        raise no_tensor(name, value)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} must be bool or integer, got {value.dtype}")
    same_shape(name, value, like, shape)
    return value.detach() != 0


def same_shape(name: str, value: Tensor, like: str, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{name} must be shaped like {like}, {tuple(shape)}, got {tuple(value.shape)}"
        )


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """A finite one in [low, high], or (low, high]."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    inside = (low < value if open_low else low <= value) and value <= high
    if not (math.isfinite(value) and inside):
        left = "(" if open_low else "["
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}], got {value!r}")
    return float(value)


def count(name: str, value: Any, low: int) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)
