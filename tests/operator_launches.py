# SPDX-License-Identifier: Apache-2.0
"""Launches of compiled operators that serve a CPU alone: rows and batches scored at once, places,
factors of gradients and rows under them, pairs, and squared errors."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpref.scoring.types import statistics_dtype
from tests.row_launches import Launch, Place, placed
from tests.scoring.settling import MAPS

ROWS, TOTAL, WIDTH = 5, 9, 7  # rows scored, of a batch, and their hidden size


def scored(
    dtype: torch.dtype, map: str, cols: int, batch: bool, biased: bool, total: int = ROWS
) -> Launch:
    """By ``score_batch_`` the rows at places of a batch of ``total``, or by ``score_rows_``."""

    def run(_: Any, place: Place) -> list[Tensor]:
        ops, exact = torch.ops.fastpref, statistics_dtype(dtype)
        hidden = place(torch.randn(ROWS, WIDTH + 2).to(dtype)[:, 1 : WIDTH + 1])
        weight = place(torch.randn(cols, WIDTH + 1).to(dtype)[:, :WIDTH])
        bias = placed(place, torch.randn(cols, dtype=exact) if biased else None)
        target = torch.randint(cols, (total,))
        # The last column, in the last row.
        target[-1] = cols - 1
        target = place(target)
        places = torch.arange(total - ROWS, total) if total > ROWS else None
        found = []
        for write in (False, True):
            tile = place(torch.randn(ROWS, cols + 3).to(dtype)[:, 2 : cols + 2])
            given = tile, hidden, weight, target
            more = bias, *MAPS[map][:2], write
            if batch:
                made = ops.score_batch_(*given, placed(place, places), *more)
            else:
                made = ops.score_rows_(*given, *more, True)
            found += [tile, *made]
        return found

    kind = f"score_{'batch' if batch else 'rows'}-{dtype}-{map}-{cols}"
    return Launch(f"{kind}-{total}-{'biased' if biased else 'plain'}", run)


def factors(dtype: torch.dtype, total: int) -> Launch:
    def run(_: Any, place: Place) -> list[Tensor]:
        gradient, scale = place(torch.randn(total, dtype=dtype)), torch.randn(total, dtype=dtype)
        return [torch.ops.fastpref.gradient_factors(gradient, place(scale), 0.7)]

    return Launch(f"gradient_factors-{dtype}-{total}", run)


def under_gradient(dtype: torch.dtype, width: int) -> Launch:
    def run(_: Any, place: Place) -> list[Tensor]:
        ops, exact, found = torch.ops.fastpref, statistics_dtype(dtype), []
        gradient = place(torch.randn(TOTAL, 1, dtype=exact)).expand(TOTAL, 2)
        every, places = 2 * TOTAL, place(torch.arange(2 * TOTAL - 1, 2, -2).flip(0))
        for at, total in ((None, every), (places, every), (places, len(places))):
            count = every if at is None else len(at)
            numbers, rows = torch.randn(10, count, dtype=exact), torch.randn(total, width)
            found += ops.gradient_rows(gradient, place(numbers), place(rows.to(dtype)), at, 0.7)[:2]
        out, factor = place(torch.randn(every, width).to(dtype)), found[-2]
        ops.spread_rows_(out, place(found[-1].clone()), place(factor.clone()), places)
        return [*found, out]

    return Launch(f"gradient_rows-{dtype}-{width}", run)


def places(total: int) -> Launch:
    def run(_: Any, place: Place) -> list[Tensor]:
        there = torch.arange(total) % 3 > 0
        ops, target = torch.ops.fastpref, place(torch.where(there, 3, -100))
        found = [ops.scored_places(target, -100)[0]]
        for dtype in (torch.float32, torch.float64):
            found.append(ops.nonzero_places(place(there.to(dtype)))[0])
        return found

    return Launch(f"places-{total}", run)


def pairs(dtype: torch.dtype, count: int, lengths: bool) -> Launch:
    def run(_: Any, place: Place) -> list[Tensor]:
        logps = [place(torch.randn(2 * count, dtype=dtype)[::2]) for _ in range(4)]
        sizes = [place(torch.randint(9, (count,))) for _ in range(2)]
        given = sizes if lengths else (None, None)
        return list(torch.ops.fastpref.pair_head(*logps, *given, 0, 0.1, 0.0, 0.0, 0.1, lengths))

    return Launch(f"pair_head-{dtype}-{count}-{'lengths' if lengths else 'sums'}", run)


def rows_of_pairs(dtype: torch.dtype, count: int, lengths: bool) -> Launch:
    def run(_: Any, place: Place) -> list[Tensor]:
        shape, found = (2 * count, 3), []
        logp = place(-torch.rand(shape, dtype=dtype))
        target = place(torch.where(torch.rand(shape) < 0.3, -100, 1))
        reference = place(torch.randn(4 * count, dtype=dtype)[::2])
        link = 0, 0.1, 0.0, 0.0, 0.1, lengths
        for interleaved in (False, True):
            given = logp, target, -100, reference, interleaved, lengths, float(count), *link
            found += torch.ops.fastpref.pair_rows(*given)
        return found

    return Launch(f"pair_rows-{dtype}-{count}-{'lengths' if lengths else 'sums'}", run)


def errors(dtype: torch.dtype, length: int, alone: bool) -> Launch:
    """Of three samples in two pieces."""

    def run(_: Any, place: Place) -> list[Tensor]:
        ops, exact = torch.ops.fastpref, statistics_dtype(dtype)
        shape = 3, 2, length
        model, target, out = (
            place(torch.randn(3, 2, length + 1).to(dtype)[..., :length]) for _ in range(3)
        )
        reference = placed(place, None if alone else torch.randn(shape).to(dtype))
        mask, factor = place(torch.rand(shape) < 0.5), place(torch.randn(3, dtype=exact))
        found = []
        for kept in (None, mask):
            found += ops.squared_errors(model, reference, target, kept, 2.0)
            ops.error_gradient_(out, model, target, kept, factor)
            found.append(out.clone())
        return found

    return Launch(f"squared_errors-{dtype}-{length}-{'alone' if alone else 'two'}", run)


def of_rows(dtype: torch.dtype, map: str, cols: int) -> Iterator[Launch]:
    yield scored(dtype, map, cols, False, True)
    yield scored(dtype, map, cols, True, True, TOTAL)
    yield scored(dtype, map, cols, True, False)


def of_vectors(size: int) -> Iterator[Launch]:
    yield places(size)
    for dtype in (torch.float32, torch.float64):
        yield factors(dtype, size)
        for lengths in (False, True):
            yield pairs(dtype, size, lengths)
            yield rows_of_pairs(dtype, size, lengths)


def of_errors(dtype: torch.dtype, length: int) -> Iterator[Launch]:
    for alone in (False, True):
        yield errors(dtype, length, alone)
