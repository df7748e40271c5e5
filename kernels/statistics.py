# SPDX-License-Identifier: Apache-2.0
"""What all kernels that sum a row's statistics have in common: which there are, and their terms.

After the sum of e = exp(t - anchor), and in the order of fastpref/scoring/statistics.py, a row has
the kinds

    0 the largest t (the target's included), 1 the sum of e (t - that),
    2 the sum of e^2, 3 under a cap the sum of t; of these two the target is left out.

A term of the last two is a number of its column alone: as ``terms`` they pass through the kernels
together. The first of them moves with the anchor, the second does not.
"""

import triton
import triton.language as tl

BEST, WEIGHTED, SQUARES, TOTAL = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def no_terms(SHAPE: tl.constexpr):
    zeros = tl.zeros(SHAPE, dtype=tl.float32)
    return zeros, zeros


@triton.jit
def sum_terms(e, t, other, CAPPED: tl.constexpr):
    """Over the columns of each row. ``e`` is 0 at the target, and where ``other`` is not."""
    squares = tl.sum(e * e, 1)
    total = tl.zeros_like(squares)
    if CAPPED:
        total = tl.sum(tl.where(other, t, 0.0), 1)
    return squares, total


@triton.jit
def mask_terms(sums, mask):
    return tl.where(mask, sums[0], 0.0), tl.where(mask, sums[1], 0.0)


@triton.jit
def add_terms(sums, more, CAPPED: tl.constexpr):
    total = sums[1]
    if CAPPED:
        total += more[1]
    return sums[0] + more[0], total


@triton.jit
def take_terms(taken, sums, before):
    """As ``before`` where no e was taken; what does not move with the anchor counts everywhere."""
    return tl.where(taken, sums[0], before[0]), sums[1]


@triton.jit
def move_terms(sums, factor):
    """To an anchor about which each e is ``factor`` times what it was."""
    return sums[0] * factor * factor, sums[1]


@triton.jit
def fold_terms(sums):
    return tl.sum(sums[0], 0), tl.sum(sums[1], 0)


@triton.jit
def load_terms(first, kind, mask, CAPPED: tl.constexpr):
    """From where the first statistic lies, ``kind`` numbers from one to the next."""
    squares = tl.load(first + SQUARES * kind, mask, 0.0)
    total = tl.zeros_like(squares)
    if CAPPED:
        total = tl.load(first + TOTAL * kind, mask, 0.0)
    return squares, total


@triton.jit
def store_terms(first, kind, at, sums, mask, CAPPED: tl.constexpr):
    """``at`` of each row comes last: an address of each kind and row takes registers."""
    tl.store(first + SQUARES * kind + at, sums[0], mask)
    if CAPPED:
        tl.store(first + TOTAL * kind + at, sums[1], mask)
