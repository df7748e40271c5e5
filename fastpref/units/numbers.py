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
    """Of padded rows, for objectives of tokens; 0 where not scored.

    - ``logp``: (B, T), of the policy. Differentiable.
    - ``ref_logp``: (B, T), of the reference, or None.
    - ``scored``: (B, T) bool.
    """

    logp: Tensor
    ref_logp: Tensor | None
    scored: Tensor


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of B rows, in their order. What an objective does not take is not made.

    - ``logps``: (B,), of the policy. Differentiable.
    - ``ref_logps``: (B,), of the reference, or None.
    - ``lengths``: makes (B,) int64, the numbers of scored tokens; None where there are no tokens.
    - ``tokens``: the numbers of each token, or None.
    - ``makers``: of further extras, each by the names of what it returns, shaped as the objective
      wants.
    """

    logps: Tensor
    ref_logps: Tensor | None = None
    lengths: Callable[[], Tensor] | None = None
    tokens: TokenNumbers | None = None
    makers: dict[tuple[str, ...], Callable[[], tuple[Tensor, ...]]] = field(default_factory=dict)
