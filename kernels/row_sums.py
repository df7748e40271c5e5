# SPDX-License-Identifier: Apache-2.0
"""The partial sums of linear_exp.py, added over the column tiles in a fixed order.

For row n with tiles j (kinds as there): S = sum_j S_j, and with statistics

    best = max_j best_j,   its first column,   weighted = sum_j weighted_j + (best_j - best) S_j,
    squares = sum_j squares_j,   total = sum_j total_j.

``flag`` is 1 where the anchor will not do: S is not finite or above ``LIMIT``.
"""

import triton
import triton.language as tl

ROWS, TILES = 32, 32  # of one program's block
# exp(40) leaves exp(80) for a sum of squares: float32 ends at exp(88).
LIMIT = tl.constexpr(2.3538526683702e17)


@triton.jit
def _load_tiles(sums, first, tiles, stride, ids, mask, other, BLOCK_TILES: tl.constexpr):
    tile = first + tl.arange(0, BLOCK_TILES)
    at = tile.to(tl.int64)[:, None] * stride + ids[None, :]
    return tl.load(sums + at, (tile < tiles)[:, None] & mask[None, :], other)


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
):
    """Adds the tiles of rows ``ids`` into ``out``; returns S."""
    parts = tl.zeros((BLOCK_TILES, BLOCK_ROWS), dtype=tl.float32)
    for first in range(0, tiles, BLOCK_TILES):
        parts += _load_tiles(sums, first, tiles, stride, ids, mask, 0.0, BLOCK_TILES)
    total = tl.sum(parts, 0)
    tl.store(out + ids, total, mask)
    if best_index is not None:
        kind = tl.cast(tiles, tl.int64) * stride
        best = tl.full((BLOCK_ROWS,), -float("inf"), dtype=tl.float32)
        index = tl.zeros((BLOCK_ROWS,), dtype=tl.int32)
        for first in range(0, tiles, BLOCK_TILES):
            tops = _load_tiles(
                sums + kind, first, tiles, stride, ids, mask, -float("inf"), BLOCK_TILES
            )
            found = _load_tiles(best_index, first, tiles, stride, ids, mask, 0, BLOCK_TILES)
            top = tl.max(tops, 0)
            at = tl.min(tl.where(tops == top[None, :], found, 2147483647), 0)
            index = tl.where(top > best, at, index)
            best = tl.maximum(best, top)
        weighted = tl.zeros((BLOCK_TILES, BLOCK_ROWS), dtype=tl.float32)
        squares = tl.zeros((BLOCK_TILES, BLOCK_ROWS), dtype=tl.float32)
        logits = tl.zeros((BLOCK_TILES, BLOCK_ROWS), dtype=tl.float32)
        for first in range(0, tiles, BLOCK_TILES):
            s = _load_tiles(sums, first, tiles, stride, ids, mask, 0.0, BLOCK_TILES)
            tops = _load_tiles(sums + kind, first, tiles, stride, ids, mask, 0.0, BLOCK_TILES)
            # A tile of nothing but -inf has no weight.
            weighted += tl.where(s > 0, (tops - best[None, :]) * s, 0.0)
            weighted += _load_tiles(
                sums + 2 * kind, first, tiles, stride, ids, mask, 0.0, BLOCK_TILES
            )
            squares += _load_tiles(
                sums + 3 * kind, first, tiles, stride, ids, mask, 0.0, BLOCK_TILES
            )
            logits += _load_tiles(
                sums + 4 * kind, first, tiles, stride, ids, mask, 0.0, BLOCK_TILES
            )
        tl.store(out + stride + ids, best, mask)
        tl.store(out + 2 * stride + ids, tl.sum(weighted, 0), mask)
        tl.store(out + 3 * stride + ids, tl.sum(squares, 0), mask)
        tl.store(out + 4 * stride + ids, tl.sum(logits, 0), mask)
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
):
    ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = ids < rows
    total = add_tiles(
        sums, best_index, ids, mask, out, out_index, tiles, sums_stride, BLOCK_ROWS, BLOCK_TILES
    )
    # An anchor of NaN or -inf shows in S.
    tl.store(flag + ids, tl.where(total <= LIMIT, 0, 1).to(tl.int8), mask)
