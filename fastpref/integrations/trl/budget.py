# SPDX-License-Identifier: Apache-2.0
"""What memory the adapter gives itself on a GPU, where TRL's own head has to fit too."""

from __future__ import annotations

import torch

from ...scoring import BUDGET_SHARE, PRODUCT_BYTES

# Of TRL's tiles: TOKEN_CHUNK_SIZE there, and the width that it hands over.
TILE_ROWS = 4096
TILE_COLS = 32768


def default_budget(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *,
    trains_weight: bool,
    keeps: bool,
    device_memory: int,
    tile_cols: int = TILE_COLS,
) -> int:
    """Bytes of workspace that the adapter takes on a GPU.

    TRL's own head takes a tile of at most 4096 rows and ``tile_cols`` columns in ``dtype``, and the
    float32 gradient of a 16-bit weight where it is trained. Where these hold the exponentials of
    all rows, which spare a product, and the copies of rows that fastpref makes and TRL does not,
    the budget is what keeps all exponentials. A quarter of it is free then, for the tile of a
    gradient at the entropy. Where they do not, the budget is what TRL takes less those copies, or
    as much more as holds the exponentials, up to a sixteenth of the device's memory. Where that is
    too much at the time, the call runs again with less.

    A weight of another dtype than the products is copied whole from forward to backward, which TRL
    does tile by tile: with all given back, fastpref needs that copy more than TRL.

    Args:
        rows, hidden_size, vocab_size: N, H and V.
        dtype: of the products.
        weight_dtype: of the weight and its gradient.
        trains_weight: whether the weight needs a gradient.
        keeps: whether a gradient is made from exponentials that are kept: not without one, and not
            where hidden alone needs one, of ``log_probs`` alone.
        device_memory: of the device in all, bytes.
    """
    tile = min(rows, TILE_ROWS) * tile_cols * dtype.itemsize
    if not keeps:
        return max(1, tile)
    theirs, more = tile, 0
    if trains_weight and weight_dtype.itemsize < 4:
        theirs += vocab_size * hidden_size * 4
    if weight_dtype != dtype:
        more = vocab_size * hidden_size * dtype.itemsize
    exponentials, one = rows * vocab_size * dtype.itemsize, rows * hidden_size * dtype.itemsize
    # A quarter of the budget stays free for a tile.
    whole = max(1, -(-4 * exponentials // 3))
    # Of rows TRL has the gradient in float32 and rounded; fastpref packed rows, the same scaled,
    # the gradient, the same in place, and where some are recomputed it in float32 and a product.
    if exponentials + one + more <= theirs:
        return max(tile, whole)
    theirs -= 3 * one + PRODUCT_BYTES + more
    return max(tile, theirs, min(whole, device_memory // BUDGET_SHARE))
