# SPDX-License-Identifier: Apache-2.0
"""Temperatures of their own for positions: their checks, and the factors that they become."""

from __future__ import annotations

import torch
from torch import Tensor

from .._extension import has_tangent
from .transforms import requires_grad, without_values
from .validation import LEAST, MOST


def check_temperature(temperature: Tensor, target: Tensor, like: str = "target") -> Tensor:
    """As an expanded view of the shape of ``target``, which messages call ``like``.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    if not temperature.is_floating_point():
        raise TypeError(
            f"temperature must be floating point, got {temperature.dtype}; use temperature.float()"
        )
    if (torch.is_grad_enabled() and requires_grad(temperature)) or has_tangent(temperature):
        raise ValueError(
            "temperature must not require a gradient or have a tangent, which are not formed; pass "
            "temperature.detach()"
        )
    if temperature.device != target.device:
        raise ValueError(
            f"temperature must be on {target.device}, where hidden is; got {temperature.device}. "
            "Move it there"
        )
    shape, own = target.shape, temperature.shape
    if temperature.numel() == 1:
        return temperature.reshape(()).expand(shape)
    pairs = zip(reversed(own), reversed(shape), strict=False)
    if len(own) > len(shape) or not all(one in (1, size) for one, size in pairs):
        raise ValueError(
            f"temperature must be a number or broadcast to the shape of {like}, {tuple(shape)}; "
            f"got {tuple(own)}. One a row, (B,), is temperature[:, None] for (B, T)"
        )
    return temperature.expand(shape)


def factor_of(temperature: Tensor, scored: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What logits are multiplied by, 1 / temperature, contiguous and in ``dtype``: 1 where a
    position is not ``scored`` (None: all are), whatever its temperature, and NaN where the
    temperature is out of range.

    Raises:
        ValueError: it is, where the host knows.
    """
    wide = temperature.to(dtype)
    outside = ~((wide >= LEAST) & (wide <= MOST))
    if scored is not None:
        outside = outside & scored
    if _is_known(temperature) and bool(outside.any()):
        raise ValueError(
            f"temperature must be greater than 0, between {LEAST} and {MOST}, at every scored "
            f"position, got {temperature[outside][0].item()}; logits are divided by it"
        )
    factor = wide.reciprocal().masked_fill(outside, torch.nan)
    if scored is not None:
        factor = factor.masked_fill(~scored, 1)
    return factor.contiguous()


def _is_known(tensor: Tensor) -> bool:
    """Whether the host can look at its values without waiting."""
    on_host = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_host and not without_values(tensor)
