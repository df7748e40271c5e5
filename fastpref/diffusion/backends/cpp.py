# SPDX-License-Identifier: Apache-2.0
"""Squared errors and their gradient by the compiled operators, on the CPU
(csrc/cpu/squared_errors.inl)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._extension import fake_of
from . import exact_dtype


def squared_errors(
    model: Tensor, ref: Tensor | None, target: Tensor, mask: Tensor | None, divisor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As plain.squared_errors."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.fastpref.squared_errors(
        model, ref, target, mask, divisor
    )
    return found


def error_gradient(
    out: Tensor, model: Tensor, target: Tensor, mask: Tensor | None, factor: Tensor
) -> None:
    """As plain.error_gradient."""
    torch.ops.fastpref.error_gradient_(out, model, target, mask, factor)


@fake_of("fastpref::squared_errors")
def _squared_errors(
    model: Tensor, reference: Tensor | None, target: Tensor, mask: Tensor | None, divisor: float
) -> tuple[Tensor, Tensor, Tensor]:
    samples, exact = model.shape[0], exact_dtype(model, reference, target)
    compared = 0 if reference is None else samples
    return (
        model.new_empty((compared,), dtype=exact),
        model.new_empty((samples,), dtype=exact),
        model.new_empty((compared,), dtype=exact),
    )


@fake_of("fastpref::error_gradient_")
def _error_gradient(
    out: Tensor, model: Tensor, target: Tensor, mask: Tensor | None, factor: Tensor
) -> None:
    return None
