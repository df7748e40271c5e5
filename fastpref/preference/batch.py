# SPDX-License-Identifier: Apache-2.0
"""Numbers of tokens to numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.sequence_parts import sum_of_sequence_parts
from ..sequences import sequence_logp


@dataclass
class Batch:
    """Which tokens are scored, and which row each belongs to."""

    target: Tensor  # (B, T), or (N,) with cu_seqlens
    ignore_index: int
    cu_seqlens: Tensor | None  # (B + 1,)
    seq_group: dist.ProcessGroup | None  # over which each row's tokens are spread

    # Not functools.cached_property: torch.compile cannot trace its lock.
    def __post_init__(self) -> None:
        self.scored = self.target != self.ignore_index  # like target
        self._lengths: Tensor | None = None

    def lengths(self) -> Tensor:
        """(B,) int64, the number of scored tokens of each row."""
        if self._lengths is None:
            self._lengths = self.sums(self.scored.double()).long()
        return self._lengths

    @property
    def rows(self) -> int:
        """B."""
        return self.target.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def sums(self, per_token: Tensor, token_weights: Tensor | None = None) -> Tensor:
        """Per-token values, 0 where not scored -> (B,)."""
        if self.cu_seqlens is None:
            own = sequence_logp(per_token, mask=self.scored, token_weights=token_weights)
        else:
            if token_weights is not None:
                token_weights = torch.where(self.scored, token_weights, 0)
            own = sequence_logp(per_token, cu_seqlens=self.cu_seqlens, token_weights=token_weights)
        return sum_of_sequence_parts(own, self.seq_group)

    def means(self, per_token: Tensor) -> Tensor:
        """Means over each row's scored tokens, 0 for a row without any -> (B,)."""
        return self.sums(per_token) / self.lengths().clamp(min=1)
