# SPDX-License-Identifier: Apache-2.0
"""Rows whose anchor will not do, projected again about their largest logit.

Five kernels after row_sums.py, launched always and done at once where no row is flagged, so that
the host never waits to learn it: ``list_flagged_kernel`` packs the flagged rows' numbers,
``largest_logit_kernel`` finds the largest logit of each column tile (the target's left out),
``anchor_kernel`` makes the largest of these the row's anchor, ``reanchor_kernel`` writes the
exponentials and sums of those rows anew, and ``sum_flagged_kernel`` adds these up. The cost is two
products of the flagged rows, however they are scattered.
"""

import triton
import triton.language as tl

from .linear_exp import finish_tile, load_target
from .logit_map import map_logits
from .products import load_product
from .row_sums import add_tiles

# A row of nothing but -inf takes a finite anchor below every other part's.
LOWEST_ANCHOR = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["rows"])
def list_flagged_kernel(
    flag,  # (N,) int8
    flagged,  # (N,) int32, the numbers of the flagged rows, ascending
    count,  # (1,) int32
    rows,
    BLOCK: tl.constexpr,
):
    found = 0
    for start in range(0, rows, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        here = tl.load(flag + ids, ids < rows, 0).to(tl.int32)
        tl.store(flagged + found + tl.cumsum(here, 0) - here, ids, here == 1)
        found += tl.sum(here, 0)
    tl.store(count, found)


@triton.jit(
    do_not_specialize=["columns", "width", "hidden_stride", "weight_stride"],
    do_not_specialize_on_alignment=["bias", "target"],
)
def largest_logit_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,), or None
    target,  # (N,)
    flagged,  # (N,)
    count,  # (1,)
    largest,  # (column tiles, N), by position in the list, rows at multiples of sums_stride
    sums_stride,
    columns,
    width,
    hidden_stride,
    weight_stride,
    scale,
    inner,
    cap,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    found = tl.load(count)
    row_tiles = tl.cdiv(found, BLOCK_ROWS)
    for tile in range(
        tl.program_id(0), row_tiles * tl.cdiv(columns, BLOCK_COLS), tl.num_programs(0)
    ):
        position = (tile % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        col_tile = tile // row_tiles
        mask = position < found
        ids = tl.load(flagged + position, mask, 0)
        cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        acc = load_product(
            hidden,
            weight,
            ids,
            mask,
            cols,
            columns,
            width,
            hidden_stride,
            weight_stride,
            BLOCK_ROWS,
            BLOCK_COLS,
            BLOCK_WIDTH,
            PRECISION,
        )
        if bias is not None:
            acc += tl.load(bias + cols, cols < columns, 0.0)[None, :]
        t, _ = map_logits(acc, scale, inner, cap, CAPPED)
        own = load_target(target, ids, mask, columns)
        other = (cols < columns)[None, :] & (cols[None, :] != own[:, None])
        top = tl.max(tl.where(other, t, -float("inf")), 1)
        tl.store(largest + tl.cast(col_tile, tl.int64) * sums_stride + position, top, mask)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["anchor"])
def anchor_kernel(
    largest,  # (column tiles, N), by position in the list
    flagged,
    count,
    anchor,  # (N,), those of flagged rows are replaced
    tiles,
    sums_stride,
    BLOCK_ROWS: tl.constexpr,
):
    found = tl.load(count)
    for start in range(tl.program_id(0) * BLOCK_ROWS, found, tl.num_programs(0) * BLOCK_ROWS):
        position = start + tl.arange(0, BLOCK_ROWS)
        mask = position < found
        top = tl.full((BLOCK_ROWS,), -float("inf"), dtype=tl.float32)
        for tile in range(tiles):
            at = tl.cast(tile, tl.int64) * sums_stride + position
            top = tl.maximum(top, tl.load(largest + at, mask, 0.0))
        ids = tl.load(flagged + position, mask, 0)
        tl.store(anchor + ids, tl.where(top == -float("inf"), LOWEST_ANCHOR, top), mask)


@triton.jit(
    do_not_specialize=["columns", "width", "exps_stride", "hidden_stride", "weight_stride"],
    do_not_specialize_on_alignment=["bias", "target", "anchor"],
)
def reanchor_kernel(
    hidden,
    weight,
    exps,  # (N, V) pointer, or None
    exps_stride,
    bias,
    target,
    anchor,
    sums,  # (kinds, column tiles, N)
    best_index,
    sums_stride,
    flagged,
    count,
    columns,
    width,
    hidden_stride,
    weight_stride,
    scale,
    inner,
    cap,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    found = tl.load(count)
    row_tiles = tl.cdiv(found, BLOCK_ROWS)
    for tile in range(
        tl.program_id(0), row_tiles * tl.cdiv(columns, BLOCK_COLS), tl.num_programs(0)
    ):
        position = (tile % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = position < found
        ids = tl.load(flagged + position, mask, 0)
        col = (tile // row_tiles) * BLOCK_COLS
        acc = load_product(
            hidden,
            weight,
            ids,
            mask,
            col + tl.arange(0, BLOCK_COLS),
            columns,
            width,
            hidden_stride,
            weight_stride,
            BLOCK_ROWS,
            BLOCK_COLS,
            BLOCK_WIDTH,
            PRECISION,
        )
        finish_tile(
            acc,
            ids,
            mask,
            0,
            col,
            exps,
            bias,
            target,
            anchor,
            sums,
            best_index,
            sums_stride,
            columns,
            exps_stride,
            scale,
            inner,
            cap,
            BLOCK_ROWS,
            BLOCK_COLS,
            SLICES,
            False,
            RAGGED,
            ALIGNED,
            CAPPED,
            EXACT,
        )


@triton.jit(do_not_specialize=["tiles"])
def sum_flagged_kernel(
    sums,
    best_index,
    flagged,
    count,
    out,
    out_index,
    tiles,
    sums_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CAPPED: tl.constexpr,
):
    found = tl.load(count)
    for start in range(tl.program_id(0) * BLOCK_ROWS, found, tl.num_programs(0) * BLOCK_ROWS):
        position = start + tl.arange(0, BLOCK_ROWS)
        mask = position < found
        ids = tl.load(flagged + position, mask, 0).to(tl.int64)
        add_tiles(
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
