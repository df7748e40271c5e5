# SPDX-License-Identifier: Apache-2.0
"""What adds up squared errors and forms their gradient, by device.

Each backend is a module with ``squared_errors(model, ref, target, mask, divisor)`` and
``error_gradient(out, model, target, mask, factor)``, of tensors as plain.py has them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Backend(Protocol):
    def squared_errors(
        self, model: Tensor, ref: Tensor | None, target: Tensor, mask: Tensor | None, divisor: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def error_gradient(
        self, out: Tensor, model: Tensor, target: Tensor, mask: Tensor | None, factor: Tensor
    ) -> None: ...


def exact_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Of the arithmetic: float64 where one is, else float32."""
    wide = any(one is not None and one.dtype == torch.float64 for one in tensors)
    return torch.float64 if wide else torch.float32


def of(*tensors: Tensor | None) -> Backend:
    """What serves these, views (B, S, R) of one device."""
    from . import plain

    return plain
