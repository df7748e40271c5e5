# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities under logits mixed of two heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..backends.divergences import logit_blocks
from ..types import statistics_dtype
from . import Again, Found, Heads, Upstream
from .divergence import project


@dataclass(frozen=True, slots=True)
class Mixture:
    """The targets' log-probabilities under logits (1 + epsilon) s - epsilon t, and under (1 -
    epsilon) s + epsilon t, of a student's logits s and a teacher's t; NaN for a target that is not
    in the vocabulary."""

    epsilon: float

    models: ClassVar[int] = 2
    matrices: ClassVar[int] = 0
    whole_rows: ClassVar[bool] = True
    output_names: ClassVar[tuple[str, ...]] = ("plus", "minus")
    number_names: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("plus", "minus")
    numbers: ClassVar[tuple[str, ...]] = ()
    differentiable: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[bool] = False

    def forward(
        self,
        heads: Heads,
        rows: Sequence[Tensor],
        target: Tensor,
        tiles: Sequence[Tensor],
        write: bool,
    ) -> Found:
        project(heads, rows, tiles)
        student, teacher = heads.projectors
        parts = [rows[0].new_empty((2, 0), dtype=statistics_dtype(rows[0].dtype))]
        own, other = tiles
        both = student.slab().products(own), teacher.slab().products(other)
        for block, s, t in logit_blocks(*both):
            inside = (target[block] >= 0) & (target[block] < s.shape[1])
            index = torch.where(inside, target[block], 0)[:, None]
            # Of equal logits of -inf the difference is none.
            apart = torch.where(s == t, 0, s - t) * self.epsilon
            logps = [
                (s + shift).log_softmax(1).gather(1, index)[:, 0].where(inside, torch.nan)
                for shift in (apart, -apart)
            ]
            parts.append(torch.stack(logps))
        plus, minus = torch.cat(parts, dim=1)
        return Found((plus, minus), ())

    def complete(self, heads: Heads, rows: Sequence[Tensor], found: Found) -> Found:
        return found

    def factors(self, heads: Heads, numbers: Upstream, upstream: Upstream) -> None:
        raise RuntimeError("mixed log-probabilities have no gradient")

    def active(self, upstream: Upstream) -> Tensor:
        raise RuntimeError("mixed log-probabilities have no gradient")

    def again(
        self,
        heads: Heads,
        rows: Sequence[Tensor],
        target: Tensor,
        numbers: Upstream,
        upstream: Upstream,
    ) -> Again:
        raise RuntimeError("mixed log-probabilities have no gradient")
