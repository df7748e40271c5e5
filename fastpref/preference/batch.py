# SPDX-License-Identifier: Apache-2.0
"""Numbers of tokens to numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.sequence_parts import sum_of_sequence_parts
from ..scoring.transforms import requires_grad
from ..sequences import sequence_logp


@dataclass
class Batch:
    """Which tokens are scored, and which row each belongs to."""

    target: Tensor  # (B, T), or (N,) with cu_seqlens
    ignore_index: int
    cu_seqlens: Tensor | None  # (B + 1,)
    seq_group: dist.ProcessGroup | None  # over which each row's tokens are spread
    token_weights: Tensor | None = None  # like target

    # Not functools.cached_property: torch.compile cannot trace its lock.
    def __post_init__(self) -> None:
        self._scored: Tensor | None = None
        self._weighed: Tensor | None = None
        self._lengths: Tensor | None = None
        self._counts: Tensor | None = None

    @property
    def scored(self) -> Tensor:
        """Like target, bool."""
        if self._scored is None:
            self._scored = self.target != self.ignore_index
        return self._scored

    @property
    def weighed(self) -> Tensor:
        """Like target, bool: scored, and not taken out by a weight of 0."""
        if self.token_weights is None:
            return self.scored
        if self._weighed is None:
            self._weighed = self.scored & (self.token_weights != 0)
        return self._weighed

    def lengths(self) -> Tensor:
        """(B,) int64, the number of scored tokens of each row, whatever their weights."""
        if self._lengths is None:
            self._lengths = self._row_sums(self.scored.double(), self.scored).long()
        return self._lengths

    def counts(self) -> Tensor:
        """(B,) int64, the number of weighed tokens of each row."""
        if self.token_weights is None:
            return self.lengths()
        if self._counts is None:
            self._counts = self._row_sums(self.weighed.double(), self.weighed).long()
        return self._counts

    @property
    def to_score(self) -> Tensor:
        """Like target, the weighed tokens alone; all where the weights need a gradient, which at a
        weight of 0 is the token's score."""
        weights = self.token_weights
        if weights is None or (requires_grad(weights) and torch.is_grad_enabled()):
            return self.target
        return self.target.long().masked_fill(~self.weighed, self.ignore_index)

    @property
    def rows(self) -> int:
        """B."""
        return self.target.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def sums(self, per_token: Tensor) -> Tensor:
        """Sums of per-token values over the weighed tokens of each row -> (B,)."""
        return self._row_sums(per_token, self.weighed)

    def weighted_sums(self, per_token: Tensor) -> Tensor:
        """Sums of per-token values, each times its token's weight, over the scored tokens of each
        row -> (B,)."""
        return self._row_sums(per_token, self.scored, self.token_weights)

    def sums_of_scores(self, per_token: Tensor) -> Tensor:
        """``weighted_sums`` of what is 0 where no token is scored."""
        if self.cu_seqlens is None and self.token_weights is None:
            return sum_of_sequence_parts(sequence_logp(per_token), self.seq_group)
        return self.weighted_sums(per_token)

    def means(self, per_token: Tensor) -> Tensor:
        """Means over each row's weighed tokens, 0 for a row without any -> (B,)."""
        return self.sums(per_token) / self.counts().clamp(min=1)

    def _row_sums(
        self, per_token: Tensor, taken: Tensor, token_weights: Tensor | None = None
    ) -> Tensor:
        """Of the tokens ``taken``; others are not read."""
        if self.cu_seqlens is None:
            own = sequence_logp(per_token, mask=taken, token_weights=token_weights)
        else:
            per_token = per_token.masked_fill(~taken, 0)
            if token_weights is not None:
                token_weights = token_weights.masked_fill(~taken, 0)
            own = sequence_logp(per_token, cu_seqlens=self.cu_seqlens, token_weights=token_weights)
        return sum_of_sequence_parts(own, self.seq_group)
