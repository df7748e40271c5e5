# SPDX-License-Identifier: Apache-2.0
"""What is known of a batch, whatever it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class TokenNumbers(NamedTuple):
    """Of padded rows, for objectives of tokens; 0 where not scored."""

    logp: Tensor  # (B, T), of the policy; differentiable
    ref_logp: Tensor | None  # (B, T), of the reference
    scored: Tensor  # (B, T) bool


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """B rows, in their order. Functions are called where the objective takes what they make."""

    logps: Tensor  # (B,), of the policy; differentiable
    ref_logps: Tensor | None = None  # (B,), of the reference
    lengths: Callable[[], Tensor] | None = None  # (B,) int64, scored tokens; None: no tokens
    tokens: TokenNumbers | None = None
    # Further extras: those that are made together, by name and in the objective's shapes.
    made: Mapping[tuple[str, ...], Callable[[], tuple[Tensor, ...]]] = field(default_factory=dict)
