# SPDX-License-Identifier: Apache-2.0
"""Backends: who turns a tile of raw products into exponentials or into logit gradients.

The first two functions of a backend work on a (rows, cols) tile of raw products, the others on
(rows, H) matrices. ``target`` holds columns of the tile; a value outside [0, cols) means that the
row's target lies elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..rows import RowSums
from ..types import LogitMap


class UpstreamGradient(NamedTuple):
    """Gradients that arrive at the outputs of each row, (rows,), and the row's own scores."""

    anchor: Tensor
    norm: Tensor
    logp: Tensor
    grad_logp: Tensor
    grad_lse: Tensor | None
    grad_entropy: Tensor | None
    entropy: Tensor | None


class RowBackend(Protocol):
    """The primitive that backends differ in."""

    def exp_rows(
        self,
        tile: Tensor,
        target: Tensor,
        anchor: Tensor,
        bias: Tensor | None,
        map: LogitMap,
        write: bool,
        statistics: bool,
    ) -> RowSums:
        """Sums over each row but its target; with ``write`` the tile becomes the exponentials (0 at
        the target)."""

    def logit_grad(
        self,
        tile: Tensor,
        target: Tensor,
        upstream: UpstreamGradient,
        bias: Tensor | None,
        map: LogitMap,
    ) -> None:
        """The tile becomes the gradient with respect to the raw products."""

    def temporary_bytes(self, rows: int, cols: int, device_type: str, dtype: torch.dtype) -> int:
        """Most memory that these take beside a (rows, cols) tile."""

    def gather_dot(self, hidden: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """hidden[i] . weight[index[i]], (rows,) in the statistics' dtype."""

    def scale_rows(self, rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        """factor[i] rows[i], (rows, H), into ``out``, which may be ``rows``; rounded once."""


def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve tensors on ``device_type``, or None when it can."""
    if name == "torch":
        return None
    if name == "cpp":
        if device_type != "cpu":
            return f"the cpp backend runs on CPU tensors, got {device_type}; use backend='auto'"
        from ..._extension import ops_unavailable_reason

        return ops_unavailable_reason()
    if name == "cuda":
        from .cuda import unavailable_reason as cuda_unavailable_reason

        return cuda_unavailable_reason(device_type)
    if name == "triton":
        return "this build has no Triton kernels for scoring; use backend='auto'"
    return f"there is no backend {name!r}"


def choose(name: str, device: torch.device) -> str:
    """The backend that serves ``name`` on ``device``.

    Raises ValueError with the reason when a named one cannot.
    """
    if name == "auto":
        return "cpp" if unavailable_reason("cpp", device.type) is None else "torch"
    reason = unavailable_reason(name, device.type)
    if reason is not None:
        raise ValueError(f"backend={name!r} is not available: {reason}")
    return name


def load(name: str) -> RowBackend:
    if name in ("cpp", "cuda"):
        # The same operators: torch's dispatcher picks the kernels by the tile's device.
        from . import compiled

        return compiled
    from . import plain

    return plain
