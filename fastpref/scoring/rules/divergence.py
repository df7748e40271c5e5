# SPDX-License-Identifier: Apache-2.0
"""How far a student's distribution over the vocabulary lies from a teacher's.

Raw products of both are looked at side by side. What is kept is G, the divergence's gradient at the
student's raw products: the upstream gradient of a row only ever scales it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..backends.divergences import divergence_rows
from ..products import multiply
from ..vocab_parallel import Columns
from ..workspace import tile_of
from . import Again, Found, Heads, Numbers, Part, Upstream


@dataclass(frozen=True, slots=True)
class Divergence:
    divergence: str
    beta: float

    models: ClassVar[int] = 2
    matrices: ClassVar[int] = 1
    formed_again: ClassVar[int] = 2
    mixes: ClassVar[bool] = False
    output_names: ClassVar[tuple[str, ...]] = ("divergence",)
    number_names: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("divergence",)
    numbers: ClassVar[tuple[str, ...]] = ()
    differentiable: ClassVar[tuple[str, ...]] = ("divergence",)
    statistics: ClassVar[bool] = False

    def forward(self, heads: Heads, part: Part, tiles: Sequence[Tensor], write: bool) -> Found:
        project(heads, part.rows, tiles)
        return Found((self._values(heads, tiles, write),), ())

    def factors(self, heads: Heads, numbers: Numbers, upstream: Upstream) -> tuple[Tensor, ...]:
        return (_arrived(upstream),)

    def again(self, heads: Heads, part: Part, numbers: Numbers, upstream: Upstream) -> Again:
        def tile(columns: slice, workspace: Tensor) -> Tensor:
            tiles = two_tiles(workspace, len(part.target), columns)
            project(heads, part.rows, tiles)
            self._values(heads, tiles, True)
            return tiles[0]

        return Again(tile, _arrived(upstream))

    def _values(self, heads: Heads, tiles: Sequence[Tensor], write: bool) -> Tensor:
        student, teacher = heads.projectors
        own, other = tiles
        return divergence_rows(
            student.slab().products(own),
            teacher.slab().products(other),
            self.divergence,
            self.beta,
            write,
            heads.backend_name,
            Columns(heads.group),
        )


def project(heads: Heads, rows: Sequence[Tensor], tiles: Sequence[Tensor]) -> None:
    """Raw products of some rows of both models into their tiles."""
    for own, tile, projector in zip(rows, tiles, heads.projectors, strict=True):
        multiply(own, projector.weight.t(), tile, heads.room)


def two_tiles(workspace: Tensor, rows: int, columns: slice) -> list[Tensor]:
    half = workspace.shape[0] // 2
    return [tile_of(part, rows, columns) for part in (workspace[:half], workspace[half:])]


def _arrived(upstream: Upstream) -> Tensor:
    (gradient,) = upstream
    if gradient is None:
        raise RuntimeError("no gradient arrived")
    return gradient
