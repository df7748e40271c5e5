# SPDX-License-Identifier: Apache-2.0
"""Launches of row kernels, with names, for checks that run in a process of their own: of whatever
has the functions of a backend (fastpref/scoring/backends/cpp.py), or some of them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.scoring.backends import UpstreamGradient
from fastpref.scoring.slab import Products, Slab
from fastpref.scoring.types import statistics_dtype
from tests.rows import make_rows
from tests.scoring.settling import MAPS, make_sums

# Where a tensor lies in a launch: a copy of it, or itself.
Place = Callable[[Tensor], Tensor]


class Launch(NamedTuple):
    name: str
    # Of the kernels and where their tensors are to lie; returns all that was written.
    run: Callable[[Any, Place], list[Tensor]]


def present(tensors: Any) -> list[Tensor]:
    return [one for one in tensors if one is not None]


def placed(place: Place, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else place(tensor)


def exp_rows(
    dtype: torch.dtype,
    map: str,
    statistics: bool,
    cols: int,
    part: slice = slice(None),
    **options: Any,
) -> Launch:
    """``part`` of the rows."""

    def run(kernels: Any, place: Place) -> list[Tensor]:
        rows = make_rows(dtype, cols, MAPS[map])
        tile = place(rows.tile[part])
        products = Products(tile, placed(place, rows.bias), MAPS[map])
        arguments = (products, place(rows.target[part]), place(rows.anchor[part]))
        read = kernels.exp_rows(*arguments, False, statistics, **options)
        sums = kernels.exp_rows(*arguments, True, statistics, **options)
        return [tile, *present(read), *present(sums)]

    kind = "-".join(
        ["statistics" if statistics else "sums", *(str(options[one]) for one in options)]
    )
    return Launch(f"exp_rows-{dtype}-{map}-{cols}-{kind}", run)


def logit_grad(dtype: torch.dtype, map: str, cols: int) -> Launch:
    def run(kernels: Any, place: Place) -> list[Tensor]:
        rows = make_rows(dtype, cols, MAPS[map])
        upstream = torch.randn(7, len(rows.tile), dtype=statistics_dtype(dtype))
        upstream[1].exp_()
        tile = place(rows.tile)
        products = Products(tile, placed(place, rows.bias), MAPS[map])
        given = UpstreamGradient(*(place(one) for one in upstream))
        kernels.logit_grad(products, place(rows.target), given)
        return [tile]

    return Launch(f"logit_grad-{dtype}-{map}-{cols}", run)


def target_logits(dtype: torch.dtype, map: str, width: int) -> Launch:
    def run(kernels: Any, place: Place) -> list[Tensor]:
        hidden = place(torch.randn(7, width + 1).to(dtype)[:, 1:])
        weight = place(torch.randn(9, width + 2).to(dtype)[:, :width])
        bias = place(torch.randn(9, dtype=statistics_dtype(dtype)))
        target = place(torch.tensor([8, 0, 3, -1, 9, 2, 8]))
        return list(kernels.target_logits(hidden, Slab(weight, bias, MAPS[map]), target))

    return Launch(f"target_logits-{dtype}-{map}-{width}", run)


def settle(dtype: torch.dtype, map: str, statistics: bool, rows: int) -> Launch:
    def run(kernels: Any, place: Place) -> list[Tensor]:
        sums, own = make_sums(rows, statistics, 0.0, statistics_dtype(dtype))
        sums = sums._make(placed(place, one) for one in sums)
        own = own._make(place(one) for one in own)
        # Of a last column of the last row.
        own.column[-1] = 8
        exps = place(torch.full((rows, 12), 7.0, dtype=dtype)[:, :9])
        scores, scale = kernels.settle(sums, own, exps, MAPS[map])
        return [exps, *scores, scale]

    return Launch(f"settle-{dtype}-{map}-{'statistics' if statistics else 'sums'}-{rows}", run)


def scale_rows(dtype: torch.dtype, width: int) -> Launch:
    def run(kernels: Any, place: Place) -> list[Tensor]:
        rows = place(torch.randn(5, width + 1).to(dtype)[:, 1:])
        out = place(torch.full((5, width + 3), 7.0, dtype=dtype)[:, 2 : width + 2])
        factor = place(torch.randn(5, dtype=statistics_dtype(dtype)))
        kernels.scale_rows(rows, factor, out)
        kernels.scale_rows(rows, factor, rows)
        return [rows, out]

    return Launch(f"scale_rows-{dtype}-{width}", run)


def over_tiles(dtype: torch.dtype, map: str, cols: int) -> Iterator[Launch]:
    yield exp_rows(dtype, map, False, cols)
    yield exp_rows(dtype, map, True, cols)
    yield logit_grad(dtype, map, cols)


def between_products(dtype: torch.dtype, map: str, width: int) -> Iterator[Launch]:
    yield target_logits(dtype, map, width)
    yield settle(dtype, map, True, width)
    yield settle(dtype, map, False, width)
    yield scale_rows(dtype, width)
