# SPDX-License-Identifier: Apache-2.0
"""Scores of a policy and of a reference, and what is made of both their logits, from the same
tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..backends.divergence_formulas import logit_blocks
from ..backends.divergences import divergence_rows
from ..products import split
from ..scaled import add_scaled, scaled
from ..slab import Projection
from ..statistics import OUTPUTS, TokenScores
from ..types import statistics_dtype
from ..vocab_parallel import Columns
from . import Again, Found, Heads, Numbers, Part, Upstream
from .divergence import project, two_tiles
from .scores import Scores

BLOCK = 1 << 20  # elements of the policy's products that are copied at a time


@dataclass(frozen=True, slots=True)
class _Compared:
    """The policy's ``logp`` is differentiable; of the reference nothing is."""

    policy: Scores
    reference: Scores

    models: ClassVar[int] = 2
    compared: ClassVar[tuple[str, ...]]  # further outputs
    number_names: ClassVar[tuple[str, ...]] = Scores.number_names

    @property
    def outputs(self) -> tuple[str, ...]:
        reference = (f"ref_{name}" for name in self.reference.outputs)
        return (*self.policy.outputs, *reference, *self.made)

    @property
    def made(self) -> tuple[str, ...]:
        """Those of ``compared`` that are asked for."""
        return self.compared

    @property
    def numbers(self) -> tuple[str, ...]:
        return self.policy.numbers

    @property
    def statistics(self) -> bool:
        return self.policy.statistics or self.reference.statistics

    def parts(
        self, outputs: tuple[Tensor | None, ...]
    ) -> tuple[TokenScores, TokenScores, dict[str, Tensor | None]]:
        """Of the policy, of the reference, and what is made of both by name."""
        own, other = outputs[: len(OUTPUTS)], outputs[len(OUTPUTS) : 2 * len(OUTPUTS)]
        both = dict(zip(self.compared, outputs[2 * len(OUTPUTS) :], strict=True))
        return TokenScores._make(own), TokenScores._make(other), both

    def _scored(
        self,
        heads: Heads,
        part: Part,
        tiles: Sequence[Tensor],
        write: bool,
        compared: tuple[Tensor | None, ...],
    ) -> Found:
        """With ``write`` the policy's tile becomes its exponentials; the reference's was read."""
        found = self.policy.of_tile(heads, part, tiles[0], write, formed=True)
        return found._replace(outputs=(*found.outputs, *compared))

    def _of_reference(
        self, heads: Heads, part: Part, tiles: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        own = part._replace(rows=part.rows[1:])
        return self.reference.of_tile(heads.second(), own, tiles[1], False, formed=True).outputs


def _names(*compared: str) -> tuple[str, ...]:
    return (*OUTPUTS, *(f"ref_{name}" for name in OUTPUTS), *compared)


@dataclass(frozen=True, slots=True)
class WithDivergence(_Compared):
    """And KL(reference, policy), differentiable: beside the exponentials E of Scores is kept G, the
    divergence's gradient at the policy's raw products."""

    epsilon: float | None = None  # with one, what ``WithMixture`` has too

    matrices: ClassVar[int] = 2
    formed_again: ClassVar[int] = 2
    compared: ClassVar[tuple[str, ...]] = ("kl", "plus", "minus")
    output_names: ClassVar[tuple[str, ...]] = _names(*compared)

    @property
    def mixes(self) -> bool:
        return self.epsilon is not None

    @property
    def made(self) -> tuple[str, ...]:
        return self.compared if self.mixes else ("kl",)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("logp", "kl")

    def forward(self, heads: Heads, part: Part, tiles: Sequence[Tensor], write: bool) -> Found:
        project(heads, part.rows, tiles)
        reference = self._of_reference(heads, part, tiles)
        mixed: tuple[Tensor | None, ...] = (None, None)
        if self.epsilon is not None:
            mixed = _mixed(heads, tiles, part.target, self.epsilon)
        kl = _kl(heads, tiles, write)
        return self._scored(heads, part, tiles, write, (*reference, kl, *mixed))

    def factors(
        self, heads: Heads, numbers: Numbers, upstream: Upstream
    ) -> tuple[Tensor, ...] | None:
        own = self.policy.factors(heads, numbers, upstream[: len(OUTPUTS)])
        if own is None:
            return None
        kl = upstream[2 * len(OUTPUTS)]
        return own if kl is None else (*own, kl)

    def again(self, heads: Heads, part: Part, numbers: Numbers, upstream: Upstream) -> Again:
        given, kl = upstream[: len(OUTPUTS)], upstream[2 * len(OUTPUTS)]
        if kl is None:
            return self.policy.again(heads, part, numbers, given)
        factor, head = kl, heads.projectors[0]
        gradient = self.policy.gradient(numbers, given)

        def tile(columns: slice, workspace: Tensor) -> Tensor:
            own, other = tiles = two_tiles(workspace, len(part.target), columns)
            project(heads, part.rows, tiles)
            _kl(heads, tiles, True)
            at = Projection(part.rows[0], head.slab(), own, part.target - head.start)
            heads.backend.logit_grad(at, gradient)
            add_scaled(own, other, factor)
            return own

        return Again(tile, None)


@dataclass(frozen=True, slots=True)
class AlongDirection(WithDivergence):
    """The same for gradients at logp and kl of which each row's direction is known before it is
    scored: only D is kept, for a gradient of that direction whose larger number is 1."""

    matrices: ClassVar[int] = 1
    number_names: ClassVar[tuple[str, ...]] = (*Scores.number_names, "along_logp")

    @property
    def numbers(self) -> tuple[str, ...]:
        return *self.policy.numbers, "along_logp"

    @classmethod
    def direction(cls, slopes: Upstream) -> tuple[Tensor, Tensor]:
        """Gradients at logp and kl, (rows,) each, of which the larger is made 1; 1 and 0 where both
        are 0."""
        logp, kl = cls._along(slopes)
        larger = torch.where(kl.abs() > logp.abs(), kl, logp)
        none = larger == 0
        larger = larger.masked_fill(none, 1)
        return (logp / larger).masked_fill(none, 1), kl / larger

    def forward(self, heads: Heads, part: Part, tiles: Sequence[Tensor], write: bool) -> Found:
        # No super(): a dataclass with slots is another class than the one it finds.
        found = WithDivergence.forward(self, heads, part, tiles, write)
        if part.direction is None:
            raise RuntimeError("no direction of these rows")
        along_logp, along_kl = part.direction
        if write:
            matrix, other = tiles
            factors = self.policy.factors(heads, found.numbers, TokenScores(logp=along_logp))
            if factors is None:
                raise RuntimeError("no numbers of these rows")
            scaled(matrix, factors[0], matrix)
            add_scaled(matrix, other, along_kl)
        return found._replace(numbers=(*found.numbers, along_logp))

    def factors(self, heads: Heads, numbers: Numbers, upstream: Upstream) -> tuple[Tensor, ...]:
        along_logp = numbers[-1]
        if along_logp is None:
            raise RuntimeError("no numbers of these rows")
        return (torch.where(along_logp == 1, *self._along(upstream)),)

    def again(self, heads: Heads, part: Part, numbers: Numbers, upstream: Upstream) -> Again:
        return WithDivergence.again(self, heads, part, numbers[:-1], upstream)

    @staticmethod
    def _along(upstream: Upstream) -> tuple[Tensor, Tensor]:
        """Gradients at logp and kl."""
        logp, kl = upstream[OUTPUTS.index("logp")], upstream[2 * len(OUTPUTS)]
        some = kl if logp is None else logp
        if some is None:
            raise RuntimeError("no gradient arrived")
        nothing = torch.zeros_like(some)
        return nothing if logp is None else logp, nothing if kl is None else kl


@dataclass(frozen=True, slots=True)
class WithMixture(_Compared):
    """And the targets' log-probabilities under logits (1 + epsilon) s - epsilon t and (1 - epsilon)
    s + epsilon t, of the policy's logits s and the reference's t, without gradient; NaN for a
    target that is not in the vocabulary."""

    epsilon: float

    mixes: ClassVar[bool] = True
    matrices: ClassVar[int] = 1
    formed_again: ClassVar[int] = 1
    compared: ClassVar[tuple[str, ...]] = ("plus", "minus")
    output_names: ClassVar[tuple[str, ...]] = _names(*compared)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("logp",)

    def forward(self, heads: Heads, part: Part, tiles: Sequence[Tensor], write: bool) -> Found:
        project(heads, part.rows, tiles)
        reference = self._of_reference(heads, part, tiles)
        mixed = _mixed(heads, tiles, part.target, self.epsilon)
        return self._scored(heads, part, tiles, write, (*reference, *mixed))

    def factors(
        self, heads: Heads, numbers: Numbers, upstream: Upstream
    ) -> tuple[Tensor, ...] | None:
        return self.policy.factors(heads, numbers, upstream[: len(OUTPUTS)])

    def again(self, heads: Heads, part: Part, numbers: Numbers, upstream: Upstream) -> Again:
        return self.policy.again(heads, part, numbers, upstream[: len(OUTPUTS)])


def _kl(heads: Heads, tiles: Sequence[Tensor], write: bool) -> Tensor:
    """KL(reference, policy) of each row; with ``write`` G takes the place of the reference's
    products."""
    own, other = tiles
    policy, reference = (projector.slab() for projector in heads.projectors)
    # Each block of sharded heads has its collectives, and ranks hold different numbers of columns.
    whole = not write or heads.group is not None
    step = max(1, own.shape[0] if whole else BLOCK // max(1, own.shape[1]))
    values = []
    for rows in split(0, max(1, own.shape[0]), step):
        products = policy.products(own).of_rows(rows)
        if write:
            # G is written over what it is made of, and E is made of that too.
            products = products._replace(tile=products.tile.clone())
        teacher = reference.products(other).of_rows(rows)
        name = heads.backend_name
        given = products, teacher, "forward_kl", 0.5, write, name, Columns(heads.group)
        values.append(divergence_rows(*given))
        if write:
            teacher.tile.copy_(products.tile)
    return torch.cat(values)


def _mixed(
    heads: Heads, tiles: Sequence[Tensor], target: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    own, other = tiles
    policy, reference = (projector.slab() for projector in heads.projectors)
    columns, place = Columns(heads.group), target - heads.projectors[0].start
    parts = [own.new_empty((2, 0), dtype=statistics_dtype(own.dtype))]
    for block, s, t in logit_blocks(policy.products(own), reference.products(other), columns):
        inside = (place[block] >= 0) & (place[block] < s.shape[1])
        index = torch.where(inside, place[block], 0)[:, None]
        nobody = columns.total(inside.to(s.dtype)) == 0
        # Of equal logits of -inf the difference is none.
        apart = torch.where(s == t, 0, s - t) * epsilon
        logps = [
            columns.total(columns.log_softmax(s + shift).gather(1, index)[:, 0].where(inside, 0))
            for shift in (apart, -apart)
        ]
        parts.append(torch.stack(logps).where(~nobody, torch.nan))
    plus, minus = torch.cat(parts, dim=1)
    return plus, minus
