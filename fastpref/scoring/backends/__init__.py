# SPDX-License-Identifier: Apache-2.0
"""Backends: who turns raw products into exponentials or into logit gradients, a module each by the
name of its option.

``target`` holds columns of the slab; a value outside [0, cols) means that the
row's target lies elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple, Protocol

# Not torch itself: it would be what ``from . import torch`` finds.
from torch import Tensor
from torch import device as Device
from torch import dtype as Dtype

from ..rows import Scored, TargetLogits
from ..slab import Projection, Slab
from ..statistics import RowScores, RowSums
from ..types import BACKENDS, LogitMap
from . import verdict
from .choice import Size


class UpstreamGradient(NamedTuple):
    """Gradients that arrive at the outputs of each row, (rows,), and the row's own scores."""

    anchor: Tensor
    norm: Tensor
    logp: Tensor
    grad_logp: Tensor
    grad_lse: Tensor | None
    grad_entropy: Tensor | None
    entropy: Tensor | None

    def of_rows(self, rows: slice) -> UpstreamGradient:
        return UpstreamGradient._make(None if one is None else one[rows] for one in self)


class RowKernels(Protocol):
    """What rows of any backend need."""

    def temporary_bytes(
        self, rows: int, cols: int, device_type: str, dtype: Dtype, statistics: bool
    ) -> int:
        """Most memory that a pass over (rows, cols) takes beside a tile."""

    def scale_rows(self, rows: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        """factor[i] rows[i], (rows, H), into ``out``, which may be ``rows``; rounded once."""

    def target_logits(self, hidden: Tensor, slab: Slab, target: Tensor) -> TargetLogits:
        """Those of each row's target, in the statistics' dtype."""

    def gradient_factors(self, gradient: Tensor, scale: Tensor, rate: float) -> Tensor:
        """-rate gradient[i] scale[i], (rows,), 0 where the gradient is 0: what a row of E is
        multiplied by."""

    def settle(
        self, sums: RowSums, own: TargetLogits, exps: Tensor | None, map: LogitMap
    ) -> tuple[RowScores, Tensor]:
        """Scores of rows whose every column is in ``sums``, and the scale p / e of their
        exponentials, which become the matrix E of forward.py where given."""


class RowBackend(RowKernels, Protocol):
    """The primitive that backends differ in."""

    def score(
        self, projection: Projection, write: bool, statistics: bool, formed: bool
    ) -> Scored | None:
        """``target_logits``, ``project`` and ``settle`` at once, where a backend can, of rows whose
        every column is in the tile; ``formed`` says that it holds the raw products already."""

    def project(
        self, projection: Projection, anchor: Tensor, write: bool, statistics: bool
    ) -> RowSums:
        """Sums over each row of hidden weight^T but its target; with ``write`` the tile becomes the
        exponentials (0 at the target). There is none only where ``needs_tile`` says so."""

    def project_gradient(self, projection: Projection, upstream: UpstreamGradient) -> None:
        """The tile becomes the gradient with respect to the raw products hidden weight^T."""

    def exp_rows(
        self, projection: Projection, anchor: Tensor, write: bool, statistics: bool
    ) -> RowSums:
        """As ``project``, of a tile that holds the raw products already."""

    def logit_grad(self, projection: Projection, upstream: UpstreamGradient) -> None:
        """As ``project_gradient``, of a tile that holds the raw products already."""

    def needs_tile(self, dtype: Dtype, write: bool) -> bool:
        """Whether ``project`` needs a (rows, cols) tile to work in."""


def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve tensors on ``device_type``, or None when it can."""
    if name == "torch":
        return None
    if name not in BACKENDS[1:]:
        return f"there is no backend {name!r}"
    if name in ("triton", "rows"):
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        broken = import_failure(name)
        if broken is not None:
            return broken
    reason: str | None = _module(name).unavailable_reason(device_type)
    return reason


# What can serve a GPU, the one to take first first: the fused kernels where they have shown
# themselves on this very card, else one pass over the rows of torch's own products, by Triton or,
# where that is missing or fails its probe, by the CUDA C++ kernels of a library built with nvcc.
TIERS = ("triton", "rows", "cuda", "torch")


def next_tier(name: str, device_type: str) -> tuple[str, RowBackend]:
    """What serves where backend ``name`` does not."""
    later = TIERS[TIERS.index(name) + 1 :]
    serving = next(one for one in later if unavailable_reason(one, device_type) is None)
    return serving, load(serving)


def available(device_type: str) -> tuple[str, ...]:
    """Those that can serve there."""
    return tuple(name for name in (*TIERS, "cpp") if unavailable_reason(name, device_type) is None)


def choose(name: str, device: Device, size: Size) -> str:
    """The backend that serves ``name`` for a projection of ``size`` on ``device``.

    Launches nothing. On a GPU ``auto`` takes the fused kernels only by a verdict of ``tune``.

    Raises ValueError with the reason when a named one cannot.
    """
    if name == "auto":
        wanted: tuple[str, ...] = ("cpp",)
        if device.type == "cuda":
            tuned = verdict.verdict(device, size) == "triton"
            wanted = TIERS if tuned else TIERS[1:]
        for one in wanted:
            if unavailable_reason(one, device.type) is None:
                return one
        return "torch"
    reason = unavailable_reason(name, device.type)
    if reason is not None:
        raise ValueError(f"backend={name!r} is not available: {reason}")
    return name


@functools.cache
def _module(name: str) -> Any:
    """Imported only where it is used: Triton is not everywhere, nor is the compiled library."""
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def import_failure(name: str) -> str | None:
    """Why the module of backend ``name`` cannot be imported, or None when it can."""
    try:
        _module(name)
    except Exception as error:  # of a Triton that is broken, or older than the kernels
        return f"its kernels cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def load(name: str) -> RowBackend:
    """The backend of that name. On a GPU its kernels are tried before they serve."""
    from .probe import Probed
    from .tiled import Tiled

    backend: RowBackend = _module(name) if name == "triton" else Tiled(_module(name))
    return Probed(name, backend) if name in TIERS[:-1] else backend
