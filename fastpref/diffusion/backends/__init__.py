# SPDX-License-Identifier: Apache-2.0
"""What adds up squared errors and forms their gradient, by device.

Each backend is a module with ``squared_errors(model, ref, target, mask, divisor)`` and
``error_gradient(out, model, target, mask, factor)``, of tensors as plain.py has them.
"""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from ..._extension import ops_unavailable_reason, warn_of_missing_operators


class Backend(Protocol):
    def squared_errors(
        self, model: Tensor, ref: Tensor | None, target: Tensor, mask: Tensor | None, divisor: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def error_gradient(
        self, out: Tensor, model: Tensor, target: Tensor, mask: Tensor | None, factor: Tensor
    ) -> None: ...


def exact_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Of the arithmetic: float64 where one is, else float32."""
    wide = any(one is not None and one.dtype == torch.float64 for one in tensors)
    return torch.float64 if wide else torch.float32


def of(model: Tensor, ref: Tensor | None, target: Tensor, mask: Tensor | None) -> Backend:
    """What serves these, views (B, S, R) of one device."""
    if model.is_cpu:
        if ops_unavailable_reason() is None:
            from . import cpp

            return cpp
        warn_of_missing_operators()
    if model.is_cuda and importlib.util.find_spec("triton") is not None:
        from . import triton

        dtypes = (model.dtype, target.dtype, *(() if ref is None else (ref.dtype,)))
        if triton.serves(model.device, dtypes, mask is not None):
            return triton
    from . import plain

    return plain
