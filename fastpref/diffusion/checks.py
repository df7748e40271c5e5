# SPDX-License-Identifier: Apache-2.0
"""What comes in: predictions of one shape, and numbers of one value a sample or a unit."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..objectives.checks import as_python, hint, is_number, no_tensor
from ..objectives.reading import readable
from ..objectives.signature import Domain, Hyperparameter, PerUnit

Reduction: TypeAlias = Literal["mean", "sum"]
_REDUCTIONS = ("mean", "sum")
_POSITIVE = "positive", "a step without noise has no density"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_predictions(**predictions: Any) -> None:
    """Raise TypeError or ValueError unless these, by their arguments' names, can be compared
    element by element: one shape (B, ...), one device, each of a floating dtype."""
    first_name, first = next(iter(predictions.items()))
    for name, one in predictions.items():
        if not isinstance(one, Tensor):
            raise no_tensor(name, one, "a prediction of shape (B, ...)")
        if one.is_nested or one.layout != torch.strided:
            raise ValueError(
                f"{name} must be a dense tensor, got a nested one or {one.layout}; pad it, and "
                "leave what is padding out by mask"
            )
        if one.dtype not in _DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16, float32 or float64, got {one.dtype}; cast it, "
                "as in .float()"
            )
        if one.dim() == 0:
            raise ValueError(f"{name} must have shape (B, ...), got a single number; unsqueeze it")
        if one.shape != first.shape:
            raise ValueError(
                f"{name} must be shaped like {first_name}, {tuple(first.shape)}, got "
                f"{tuple(one.shape)}; expand it where it is shared"
            )
        if one.device != first.device:
            raise ValueError(
                f"{name} is on {one.device} and {first_name} on {first.device}; move it there"
            )


def check_reduction(reduction: Any) -> None:
    if reduction not in _REDUCTIONS:
        known = hint(reduction, _REDUCTIONS)
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}{known}")


def check_mask(mask: Any, like: Tensor) -> None:
    """Raise TypeError or ValueError unless it broadcasts to ``like``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise no_tensor("mask", mask, "1 where an element counts and 0 where it is left out")
    if mask.is_complex():
        raise ValueError(f"mask must be bool or a number, 0 = left out, got {mask.dtype}")
    sizes = zip(reversed(mask.shape), reversed(like.shape), strict=False)
    if mask.dim() > like.dim() or any(own not in (1, size) for own, size in sizes):
        raise ValueError(
            f"mask must broadcast to the predictions' shape {tuple(like.shape)}, got "
            f"{tuple(mask.shape)}; one value a sample is {(-1,) + (1,) * (like.dim() - 1)}"
        )
    if mask.device != like.device:
        raise ValueError(
            f"mask is on {mask.device} and the predictions on {like.device}; move it there"
        )


def check_per_sample(name: str, value: Any, like: Tensor, *, zero: bool) -> None:
    """Raise TypeError or ValueError unless it is a finite number or one a sample of ``like``, none
    of them negative and, without ``zero``, none 0. What lies on another device than the CPU is not
    looked at."""
    wanted, remedy = ("not negative", "0 weighs a sample out") if zero else _POSITIVE
    if is_number(value):
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError(f"{name} must be finite and {wanted}, got {value}; {remedy}")
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number or a tensor of one a sample, got {type(value).__name__}"
        )
    if value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"{name} must be real numbers, got {value.dtype}; use .float()")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != like.shape[0]):
        raise ValueError(
            f"{name} must be a number or have shape ({like.shape[0]},), one a sample, got shape "
            f"{tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} is on {value.device} and the predictions on {like.device}; move it there"
        )
    if readable(value):
        fits = value.isfinite() & ((value >= 0) if zero else (value > 0))
        if not fits.all():
            first = value.detach()[~fits][0].item()
            raise ValueError(f"{name} must be finite and {wanted}, got {first}; {remedy}")


def per_unit(name: str, value: Any, domain: Domain, units: Tensor) -> PerUnit:
    """``value`` checked, in the dtype of ``units``, (U,), where it is one value a unit."""
    Hyperparameter(value, domain).check(name, value)
    if not isinstance(value, Tensor):
        return float(as_python(value))
    if value.shape != units.shape:
        raise ValueError(
            f"{name} must be a number or one value a unit, {tuple(units.shape)}, got "
            f"{tuple(value.shape)}"
        )
    return value.to(units.dtype)


def one_a_unit(
    name: str,
    values: Any,
    shape: torch.Size | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """``values`` checked, in float32 or float64; of one dimension, and shape and device if said."""
    if not isinstance(values, Tensor):
        raise no_tensor(name, values, "one number a unit")
    if values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be real numbers, got {values.dtype}; use .float()")
    if values.dim() != 1 or (shape is not None and values.shape != shape):
        wanted = "one number a unit, (P,)" if shape is None else f"of shape {tuple(shape)}"
        raise ValueError(f"{name} must be {wanted}, got {tuple(values.shape)}")
    if device is not None and values.device != device:
        raise ValueError(f"{name} is on {values.device}, expected {device}; move it there")
    return values if values.dtype == torch.float64 else values.float()
