# SPDX-License-Identifier: Apache-2.0
"""What a backend is given of a head: some of its columns, or a tile of raw products with them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .types import LogitMap


class Slab(NamedTuple):
    """Columns of a head that follow each other, in the dtype of the products."""

    weight: Tensor  # (cols, H)
    bias: Tensor | None  # (cols,), statistics dtype
    map: LogitMap

    def of_rows(self, rows: slice) -> Slab:
        return self._replace(map=self.map.of_rows(rows))

    def products(self, tile: Tensor) -> Products:
        return Products(tile, self.bias, self.map)


class Projection(NamedTuple):
    """Rows through a slab, and room for their raw products."""

    hidden: Tensor  # (rows, H)
    slab: Slab
    tile: Tensor | None  # (rows, cols)
    target: Tensor  # (rows,), columns of the slab; elsewhere outside [0, cols)

    def of_rows(self, rows: slice) -> Projection:
        tile = None if self.tile is None else self.tile[rows]
        return Projection(self.hidden[rows], self.slab.of_rows(rows), tile, self.target[rows])

    @property
    def products(self) -> Products:
        """Once the tile holds them."""
        if self.tile is None:
            raise RuntimeError("there is no tile of products")
        return self.slab.products(self.tile)


class Products(NamedTuple):
    """A tile of raw products of hidden states with a slab, and what makes logits of them."""

    tile: Tensor  # (rows, cols)
    bias: Tensor | None  # (cols,), statistics dtype
    map: LogitMap

    def of_rows(self, rows: slice) -> Products:
        return self._replace(tile=self.tile[rows], map=self.map.of_rows(rows))
