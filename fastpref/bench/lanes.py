# SPDX-License-Identifier: Apache-2.0
"""fastpref's ways to serve a device, as what runs on a GPU tells them apart."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch

from .. import ScoringOptions
from . import flattened
from .scorers import why_not


class Lane(NamedTuple):
    name: str
    backend: str
    flatten: bool = False  # the fused kernels' tiles

    def unavailable(self, device: str) -> str | None:
        reason = why_not(self.backend, device)
        # Triton's interpreter, on a CPU, has tiles of its own.
        if reason is None and self.flatten and device != "cpu":
            return flattened.unavailable(torch.cuda.get_device_capability(device))
        return reason

    def options(self, **given: Any) -> ScoringOptions:
        return ScoringOptions(backend=cast(Any, self.backend), **given)

    def tiles(self) -> AbstractContextManager[None]:
        """The tiles that this lane runs on, while the context lasts."""
        return flattened.with_flattened_tiles() if self.flatten else nullcontext()


# The most likely to serve first.
ON_CUDA = (
    Lane("rows", "rows"),
    Lane("fused", "triton"),
    Lane("fused, flattened", "triton", flatten=True),
    Lane("cuda", "cuda"),
)
# They take the others' place where the flow is tried on a CPU.
ON_CPU = (Lane("cpp", "cpp"), Lane("torch", "torch"))


def lanes(device: str) -> tuple[Lane, ...]:
    return ON_CUDA if device != "cpu" else (*ON_CPU, *ON_CUDA)
