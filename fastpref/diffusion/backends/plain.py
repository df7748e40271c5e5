# SPDX-License-Identifier: Apache-2.0
"""Squared errors and their gradient in plain torch, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import exact_dtype


def squared_errors(
    model: Tensor, ref: Tensor | None, target: Tensor, mask: Tensor | None, divisor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(gap, model, reference), (B,) each, sums over ``divisor``.

    Args:
        model, ref, target: (B, S, R). Without ``ref`` gap and reference are empty.
        mask: (B, S, R) bool, False = left out, or None.
    """
    exact = exact_dtype(model, ref, target)

    def total(terms: Tensor) -> Tensor:
        return (terms if mask is None else torch.where(mask, terms, 0.0)).sum((1, 2)) / divisor

    p, t = model.to(exact), target.to(exact)
    error = total((p - t).square())
    if ref is None:
        return error.new_empty(0), error, error.new_empty(0)
    r = ref.to(exact)
    d, u = p - r, r - t
    return total(d * (d + 2 * u)), error, total(u.square())


def error_gradient(
    out: Tensor, model: Tensor, target: Tensor, mask: Tensor | None, factor: Tensor
) -> None:
    """out = factor[b] (model - target), 0 where left out, rounded once.

    Args:
        factor: (B,), float32 or float64.
    """
    apart = model.to(factor.dtype) - target.to(factor.dtype)
    apart *= factor[:, None, None]
    out.copy_(apart if mask is None else torch.where(mask, apart, 0.0))
