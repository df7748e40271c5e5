# SPDX-License-Identifier: Apache-2.0
"""What is known of a batch, whatever it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


def mean(values: Tensor) -> Tensor:
    """Of all; 0 of none, a micro-batch may be empty, still connected to the graph."""
    return values.mean() if values.numel() else values.sum()


class TokenNumbers(NamedTuple):
    """Of padded rows, for objectives of tokens; 0 where not scored."""

    logp: Tensor  # (B, T), of the policy; differentiable
    ref_logp: Tensor | None  # (B, T), of the reference
    scored: Tensor  # (B, T) bool


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of B rows, in their order. What an objective does not take is not made."""

    logps: Tensor  # (B,), of the policy; differentiable
    ref_logps: Tensor | None = None  # (B,), of the reference
    lengths: Callable[[], Tensor] | None = None  # (B,) int64, scored tokens; None: no tokens
    tokens: TokenNumbers | None = None
    # Makers of further extras, each by the names of what it returns, shaped as the objective wants.
    makers: dict[tuple[str, ...], Callable[[], tuple[Tensor, ...]]] = field(default_factory=dict)
