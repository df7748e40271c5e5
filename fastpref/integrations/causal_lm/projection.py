# SPDX-License-Identifier: Apache-2.0
"""What a linear head multiplies by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Projection(NamedTuple):
    """logits = hidden (weight + scale B A)^T + bias."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora: tuple[Tensor, Tensor, float] | None = None  # A (r, H), B (V, r), scale
