# SPDX-License-Identifier: Apache-2.0
"""A low-rank update of the head's weight, by widening the inner dimension of its products:

    hidden (weight + scale B A)^T = [hidden, scale hidden A^T] [weight, B]^T,

exact up to rounding, and every schedule runs on the wide matrices unchanged (Hu et al.,
arXiv:2106.09685). Without an update each function returns what it was given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widen(rows: Tensor, a: Tensor | None, scale: float) -> Tensor:
    """(N, H) -> (N, H + r)."""
    if a is None:
        return rows
    return torch.cat([rows, rows @ a.to(rows.dtype).t() * scale], dim=1)


def narrow_gradient(
    gradient: Tensor, rows: Tensor, a: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """The gradient at wide rows, (N, H + r) -> at rows (N, H), and at A (r, H).

    ``rows`` are wide too.
    """
    if a is None:
        return gradient, None
    width = a.shape[1]
    own, update = gradient[:, :width], gradient[:, width:] * scale
    return own + update @ a.to(update.dtype), update.t() @ rows[:, :width]
