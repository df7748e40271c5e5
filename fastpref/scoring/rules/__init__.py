# SPDX-License-Identifier: Apache-2.0
"""What a pass over tiles of raw products computes of each row, and of what its gradient is made.

A rule knows rows; packing, tiles, schedules, products and the gradients of hidden states and heads
are the engine's (forward.py, backward.py). With D the gradient at the first model's raw products,

    d hidden = D W,   d weight = D^T hidden,   d bias = D^T 1,

and a rule says in which matrices it is kept from forward to backward, each scaled row by row once
the upstream gradients are known, and how it is formed again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from ..backends import RowBackend
from ..head import Projector
from ..mean_logit import MeanRow
from ..types import LogitMap

# Upstream gradients, one for each output: (N,) in the statistics' dtype; None where none arrived.
Upstream = Sequence[Tensor | None]
# What a rule keeps of each row for backward: (N,) each; None where there is none.
Numbers = Sequence[Tensor | None]


class Heads(NamedTuple):
    """What multiplies and reduces the rows of a call."""

    projectors: tuple[Projector, ...]  # of each model; only the first has gradients
    backend: RowBackend
    backend_name: str
    group: dist.ProcessGroup | None
    # Of the first, where mean logits are asked for without a cap: no rule makes them then, nor
    # their gradient.
    mean: MeanRow | None = None
    room: int = 0  # of products, see products.py

    def with_factor(self, factor: Tensor | None) -> Heads:
        """With maps that have the factor of each row, (rows,)."""
        if factor is None:
            return self
        return self._mapped(lambda map: map._replace(factor=factor))

    def of_rows(self, rows: slice | Tensor) -> Heads:
        if self.projectors[0].map.factor is None:
            return self
        return self._mapped(lambda map: map.of_rows(rows))

    def _mapped(self, change: Callable[[LogitMap], LogitMap]) -> Heads:
        own = tuple(one._replace(map=change(one.map)) for one in self.projectors)
        return self._replace(projectors=own)

    def second(self) -> Heads:
        """The second model's alone."""
        return self._replace(projectors=self.projectors[1:], mean=None)


class Part(NamedTuple):
    """Some rows."""

    rows: Sequence[Tensor]  # of each model, (n, H)
    target: Tensor  # (n,)
    direction: tuple[Tensor, Tensor] | None = None  # (n,) each, where known before (compared.py)


class Found(NamedTuple):
    """Of some rows."""

    outputs: tuple[Tensor | None, ...]  # (rows,), what the caller gets
    numbers: tuple[Tensor | None, ...]  # (rows,), what backward needs


class Again(NamedTuple):
    """D of some rows, formed once more."""

    # Columns and room for a tile of each model -> D (rows, columns), but for ``factor``.
    tile: Callable[[slice, Tensor], Tensor]
    factor: Tensor | None  # (rows,); None: the tile is D itself


class Rule(Hashable, Protocol):
    models: ClassVar[int]  # whose tiles it looks at side by side
    matrices: ClassVar[int]  # kept of a row, each in place of a tile
    formed_again: ClassVar[int]  # models whose products D is formed again of
    output_names: ClassVar[tuple[str, ...]]
    number_names: ClassVar[tuple[str, ...]]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Which of ``output_names`` are asked for."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """Which of ``number_names`` there are then."""

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Outputs that can receive a gradient."""

    @property
    def mixes(self) -> bool:
        """Whether logits of both models are added up."""

    @property
    def statistics(self) -> bool:
        """Whether a row is more than the sum of its exponentials."""

    def forward(self, heads: Heads, part: Part, tiles: Sequence[Tensor], write: bool) -> Found:
        """``tiles`` (n, columns), one a model, are room for the products, none where the backend
        needs none; with ``write`` the first ones end as the matrices that are kept."""

    def factors(
        self, heads: Heads, numbers: Numbers, upstream: Upstream
    ) -> tuple[Tensor, ...] | None:
        """(N,) for each matrix, or for the first ones: D is their sum, each row scaled by its own;
        None where the matrices do not hold what ``upstream`` asks for."""

    def again(self, heads: Heads, part: Part, numbers: Numbers, upstream: Upstream) -> Again:
        """D of rows whose matrices were not kept."""
