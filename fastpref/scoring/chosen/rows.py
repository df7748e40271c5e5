# SPDX-License-Identifier: Apache-2.0
"""Rows times chosen rows of a matrix, x[n] . M[index[n, k]], and the gradients at x and M: a tile
of gathered rows at a time, in the statistics' dtype.

The gradient at M adds up in the order of the index, each row of M in the statistics' dtype and
rounded once, so that no buffer as large as M is needed beside the result and no order is left to
chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..products import split
from ..types import statistics_dtype

# Of gathered rows at a time: what a cache holds; launches are what costs on a GPU.
_TILE_CPU = 1 << 22
_TILE_ELSEWHERE = 1 << 28


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows of a matrix for each row of x."""

    index: Tensor  # (N, K), 0 where the row is not here
    here: Tensor  # (N, K) bool
    dtype: torch.dtype  # to which rows are rounded before they are multiplied
    tile_bytes: int

    @property
    def exact(self) -> torch.dtype:
        return statistics_dtype(self.dtype)

    def gathered(self, matrix: Tensor, rows: slice, columns: slice) -> Tensor:
        """(rows, columns, W) of ``matrix`` (V, W)."""
        index = self.index[rows, columns]
        found = matrix.index_select(0, index.reshape(-1)).to(self.dtype).to(self.exact)
        return found.view(*index.shape, matrix.shape[1])

    def tiles(self, matrix: Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the index; on a CPU none whose rows are nowhere here."""
        total, most = self.index.shape
        size = max(1, self.tile_bytes // self._row_bytes(matrix))
        used = _used(self.here) if _on_host(self.here) else [most] * total
        for rows in split(0, total, max(1, size // most)):
            for columns in split(0, max(used[rows]), size):
                yield rows, columns

    def _row_bytes(self, matrix: Tensor) -> int:
        """That a gathered row takes, its casts included."""
        casts = {matrix.dtype, self.dtype, self.exact}
        return matrix.shape[1] * sum(one.itemsize for one in casts)


def tile_bytes(budget: int, device: torch.device) -> int:
    return min(budget, _TILE_CPU if device.type == "cpu" else _TILE_ELSEWHERE)


def products(x: Tensor, matrix: Tensor, chosen: Chosen) -> Tensor:
    """(N, K) in the statistics' dtype, 0 where the row is not here."""
    found = x.new_zeros(chosen.index.shape, dtype=chosen.exact)
    for rows, columns in chosen.tiles(matrix):
        own = x[rows].to(chosen.exact)[:, None]
        # On a CPU three times as fast as the transpose of it.
        found[rows, columns] = torch.bmm(own, chosen.gathered(matrix, rows, columns).mT)[:, 0]
    return found.masked_fill_(~chosen.here, 0)


def row_gradient(d: Tensor, matrix: Tensor, chosen: Chosen) -> Tensor:
    """The gradient at x (N, W), in the statistics' dtype, of ``d`` (N, K) at the products, which is
    0 where a row is not here."""
    found = d.new_zeros((d.shape[0], matrix.shape[1]))
    for rows, columns in chosen.tiles(matrix):
        own = d[rows, columns][:, None]
        found[rows] += torch.bmm(own, chosen.gathered(matrix, rows, columns))[:, 0]
    return found


def matrix_gradient(d: Tensor, x: Tensor, matrix: Tensor, chosen: Chosen) -> Tensor:
    """The gradient at ``matrix`` (V, W), in its dtype, of ``d`` as in ``row_gradient``."""
    found = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
    at, row, factor = _in_order(chosen.index, d)
    # Rows as they are, widened, and their sums, twice.
    row_bytes = x.shape[1] * (x.itemsize + 3 * chosen.exact.itemsize + matrix.itemsize)
    last, carried = at.new_full((1,), -1), d.new_zeros((1, x.shape[1]))
    for part in split(0, at.shape[0], max(1, chosen.tile_bytes // row_bytes)):
        own = at[part]
        values = x.index_select(0, row[part]).to(chosen.exact) * factor[part, None]
        begins = torch.ones_like(own, dtype=torch.bool)
        begins[1:] = own[1:] != own[:-1]
        group = begins.cumsum(0) - 1
        sums = torch.zeros_like(values)
        add_rows(sums, group, values)
        # One that began before goes on.
        sums[:1] += carried.masked_fill((own[:1] != last)[:, None], 0)
        found.index_copy_(0, own, sums.index_select(0, group).to(found.dtype))
        last, carried = own[-1:], sums.index_select(0, group[-1:])
    return found


def add_rows(total: Tensor, at: Tensor, values: Tensor) -> None:
    """total[at[i]] += values[i], in the same order in every run."""
    if total.device.type == "cpu":
        # index_put_ adds in several threads there.
        total.index_add_(0, at, values)
    else:
        # Sorts; index_add_ adds by atomics.
        total.index_put_((at,), values, accumulate=True)


def _in_order(index: Tensor, d: Tensor) -> Sequence[Tensor]:
    """Index, row of x and factor of each product, in the order of the index; on a CPU without those
    whose factor is 0."""
    flat, factor = index.reshape(-1), d.reshape(-1)
    row = torch.arange(index.shape[0], dtype=torch.int64, device=index.device).repeat_interleave(
        index.shape[1]
    )
    if _on_host(d):
        kept = factor.nonzero()[:, 0]
        flat, row, factor = flat[kept], row[kept], factor[kept]
    flat, order = flat.sort(stable=True)
    return flat, row[order], factor[order]


def _on_host(tensor: Tensor) -> bool:
    """Whether its values can be read at no cost."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def _used(here: Tensor) -> list[int]:
    """Of each row how many columns there are up to the last that is here."""
    number = torch.arange(1, here.shape[1] + 1, dtype=torch.int64, device=here.device)
    counts: list[int] = (here * number).amax(1).tolist()
    return counts
