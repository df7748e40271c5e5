# SPDX-License-Identifier: Apache-2.0
"""The partial sums of linear_exp.py, added over the column tiles in a fixed order.

For row n with tiles j (kinds as there): S = sum_j S_j, and with statistics (statistics.py)

    best = max_j best_j,   its first column,   weighted = sum_j weighted_j + (best_j - best) S_j,
    squares = sum_j squares_j,   under a cap total = sum_j total_j.

``flag`` is 1 where the anchor will not do: S is not finite or above ``LIMIT``.
"""

import triton
import triton.language as tl

from .statistics import (
    BEST,
    WEIGHTED,
    add_terms,
    fold_terms,
    load_terms,
    no_terms,
    store_terms,
)

ROWS, TILES = 32, 32  # of one program's block
# exp(40) leaves exp(80) for a sum of squares: float32 ends at exp(88).
LIMIT = tl.constexpr(2.3538526683702e17)


@triton.jit
def _tiles_from(first, tiles, stride, ids, mask, BLOCK_TILES: tl.constexpr):
    """Where the next tiles of those rows lie among numbers of one kind, and which there are."""
    tile = first + tl.arange(0, BLOCK_TILES)
    at = tile.to(tl.int64)[:, None] * stride + ids[None, :]
    return at, (tile < tiles)[:, None] & mask[None, :]


@triton.jit
def add_tiles(
    sums,  # (kinds, tiles, N)
    best_index,  # (tiles, N), or None
    ids,
    mask,
    out,  # (kinds, N)
    out_index,  # (N,) int64, or None
    tiles,
    stride,  # between rows of sums, of best_index and of out
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Adds the tiles of rows ``ids`` into ``out``; returns S."""
    parts = tl.zeros((BLOCK_TILES, BLOCK_ROWS), dtype=tl.float32)
    for first in range(0, tiles, BLOCK_TILES):
        at, there = _tiles_from(first, tiles, stride, ids, mask, BLOCK_TILES)
        parts += tl.load(sums + at, there, 0.0)
    total = tl.sum(parts, 0)
    tl.store(out + ids, total, mask)
    if best_index is not None:
        kind = tl.cast(tiles, tl.int64) * stride
        first_kind, out = sums + kind, out + stride
        best = tl.full((BLOCK_ROWS,), -float("inf"), dtype=tl.float32)
        index = tl.zeros((BLOCK_ROWS,), dtype=tl.int32)
        for first in range(0, tiles, BLOCK_TILES):
            at, there = _tiles_from(first, tiles, stride, ids, mask, BLOCK_TILES)
            tops = tl.load(first_kind + BEST * kind + at, there, -float("inf"))
            found = tl.load(best_index + at, there, 0)
            top = tl.max(tops, 0)
            column = tl.min(tl.where(tops == top[None, :], found, 2147483647), 0)
            index = tl.where(top > best, column, index)
            best = tl.maximum(best, top)
        weighted = tl.zeros((BLOCK_TILES, BLOCK_ROWS), dtype=tl.float32)
        terms = no_terms((BLOCK_TILES, BLOCK_ROWS))
        for first in range(0, tiles, BLOCK_TILES):
            at, there = _tiles_from(first, tiles, stride, ids, mask, BLOCK_TILES)
            s = tl.load(sums + at, there, 0.0)
            tops = tl.load(first_kind + BEST * kind + at, there, 0.0)
            # A tile of nothing but -inf has no weight.
            weighted += tl.where(s > 0, (tops - best[None, :]) * s, 0.0)
            weighted += tl.load(first_kind + WEIGHTED * kind + at, there, 0.0)
            more = load_terms(first_kind + at, kind, there, CAPPED)
            terms = add_terms(terms, more, CAPPED)
        tl.store(out + BEST * stride + ids, best, mask)
        tl.store(out + WEIGHTED * stride + ids, tl.sum(weighted, 0), mask)
        store_terms(out, stride, ids, fold_terms(terms), mask, CAPPED)
        tl.store(out_index + ids, index.to(tl.int64), mask)
    return total


@triton.jit(do_not_specialize=["tiles", "rows"])
def row_sums_kernel(
    sums,  # (kinds, tiles, N) float32
    best_index,  # (tiles, N) int32, or None
    out,  # (kinds, N)
    out_index,  # (N,) int64, or None
    flag,  # (N,) int8
    tiles,
    sums_stride,
    rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CAPPED: tl.constexpr,
):
    ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = ids < rows
    total = add_tiles(
        sums,
        best_index,
        ids,
        mask,
        out,
        out_index,
        tiles,
        sums_stride,
        BLOCK_ROWS,
        BLOCK_TILES,
        CAPPED,
    )
    # An anchor of NaN or -inf shows in S.
    tl.store(flag + ids, tl.where(total <= LIMIT, 0, 1).to(tl.int8), mask)
