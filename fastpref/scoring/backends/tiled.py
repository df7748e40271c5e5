# SPDX-License-Identifier: Apache-2.0
"""Backends that let torch form a tile of raw products and then work on it in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..halves import clip_targets, lost_products
from ..products import multiply
from ..rows import Scored
from ..slab import Products, Projection
from ..statistics import RowSums
from ..workspace import lease
from . import RowKernels, UpstreamGradient

# Of a tile that the plan does not know: enough that a product is bound by arithmetic.
SPARE_ROWS = 512


class TileKernels(RowKernels, Protocol):
    """What such a backend does with a (rows, cols) tile of raw products."""

    def exp_rows(
        self,
        products: Products,
        target: Tensor,
        anchor: Tensor,
        write: bool,
        statistics: bool,
    ) -> RowSums:
        """Sums over each row but its target; with ``write`` the tile becomes the exponentials (0 at
        the target)."""

    def logit_grad(self, products: Products, target: Tensor, upstream: UpstreamGradient) -> None:
        """The tile becomes the gradient with respect to the raw products."""


class Tiled:
    """A RowBackend of such kernels; ``room`` is that of products.py."""

    def __init__(self, kernels: TileKernels, room: int = 0) -> None:
        self.kernels, self.room = kernels, room
        self.temporary_bytes, self.settle = kernels.temporary_bytes, kernels.settle
        self.target_logits, self.scale_rows = kernels.target_logits, kernels.scale_rows
        self.gradient_factors = kernels.gradient_factors
        # Where such a backend has it.
        self.score_rows: Callable[..., Scored] | None = getattr(kernels, "score_rows", None)

    def needs_tile(self, dtype: torch.dtype, write: bool) -> bool:
        return True

    def score(
        self, projection: Projection, write: bool, statistics: bool, formed: bool
    ) -> Scored | None:
        hidden, slab, tile, _ = projection
        if self.score_rows is None or tile is None or slab.map.factor is not None:
            return None
        # Of float16, targets are brought into range between the steps.
        if tile.dtype == torch.float16 or (hidden.stride(1), slab.weight.stride(1)) != (1, 1):
            return None
        if not formed:
            multiply(hidden, slab.weight.t(), tile, self.room)
        return self.score_rows(projection, write, statistics)

    def project(
        self, projection: Projection, anchor: Tensor, write: bool, statistics: bool
    ) -> RowSums:
        hidden, slab, tile, target = projection
        if tile is not None:
            multiply(hidden, slab.weight.t(), tile, self.room)
            return self.exp_rows(projection, anchor, write, statistics)
        # Planned for a backend that needs none and could not serve after all.
        shape = min(SPARE_ROWS, hidden.shape[0]), slab.weight.shape[0]
        room = lease(shape, hidden.dtype, hidden.device)
        parts = []
        for start in range(0, max(1, hidden.shape[0]), SPARE_ROWS):
            rows = slice(start, min(hidden.shape[0], start + SPARE_ROWS))
            part = room[: rows.stop - start]
            multiply(hidden[rows], slab.weight.t(), part, self.room)
            at = slab.of_rows(rows).products(part), target[rows], anchor[rows]
            parts.append(self._exp_rows(*at, False, statistics))
        columns = zip(*parts, strict=True)
        return RowSums._make(None if one[0] is None else torch.cat(one) for one in columns)

    def project_gradient(self, projection: Projection, upstream: UpstreamGradient) -> None:
        tile = projection.products.tile
        multiply(projection.hidden, projection.slab.weight.t(), tile, self.room)
        self.logit_grad(projection, upstream)

    def exp_rows(
        self, projection: Projection, anchor: Tensor, write: bool, statistics: bool
    ) -> RowSums:
        products, target = projection.products, projection.target
        return self._exp_rows(products, target, anchor, write, statistics)

    def _exp_rows(
        self, products: Products, target: Tensor, anchor: Tensor, write: bool, statistics: bool
    ) -> RowSums:
        if products.tile.dtype != torch.float16:
            return self.kernels.exp_rows(products, target, anchor, write, statistics)
        clipped, lost = clip_targets(products, target, anchor), lost_products(products)
        sums = self.kernels.exp_rows(products, target, anchor, write, statistics)
        if not write:
            # Others may look at the products too.
            clipped.put_back(products.tile)
        if lost is not None:
            sums = sums._replace(sum=torch.where(lost, torch.nan, sums.sum))
        return clipped.corrected(sums)

    def logit_grad(self, projection: Projection, upstream: UpstreamGradient) -> None:
        self.kernels.logit_grad(projection.products, projection.target, upstream)
