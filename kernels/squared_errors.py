# SPDX-License-Identifier: Apache-2.0
"""Squared errors of predictions, and their gradient. Of each sample, with d = model - reference:

    gap       = sum d (d + 2 (reference - target))
    model     = sum (model - target)^2
    reference = sum (reference - target)^2,  each over ``divisor``
    gradient  = factor (model - target)

over the elements that the mask keeps; nothing else reaches a sum, NaN neither. The tensors are
(B, S, R), S pieces of R elements that lie next to each other, and of any types.

A program adds up some tiles of one sample, element by element, then the tile; where a sample has
several programs another kernel adds their parts in float64, in order: no atomics, the same bits
every time. The first kernel reads three tensors once, the last reads two and writes one.
"""

import triton
import triton.language as tl

ELEMENTS = 2048  # of a tile
WARPS = 8
MOST_PARTS = 1024
SUMS = 3


@triton.jit
def _tile(
    tile,
    pieces,
    length,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """Of a tile: the pieces, its first element in them, the elements from there on, and which of
    these there are. A sample may have more elements than an int32 counts."""
    across = tl.cdiv(length, BLOCK_LENGTH)
    s = (tile // across).to(tl.int64) * BLOCK_PIECES + tl.arange(0, BLOCK_PIECES)
    start = (tile % across).to(tl.int64) * BLOCK_LENGTH
    i = tl.arange(0, BLOCK_LENGTH)
    return s[:, None], start, i[None, :], (s < pieces)[:, None] & (i < length - start)[None, :]


@triton.jit
def _load(tensor, b, sample_stride, piece_stride, s, start, i, inside, EXACT: tl.constexpr):
    first = tensor + b * sample_stride + start
    value = tl.load(first + s * piece_stride + i, inside, 0.0)
    if value.dtype.primitive_bitwidth < 32:  # exact; not all conversions of halves to float64 are
        value = value.to(tl.float32)
    return value.to(EXACT)


@triton.jit
def _kept(mask, b, sample_stride, piece_stride, stride, s, start, i, inside):
    first = mask + b * sample_stride + start * stride
    return tl.load(first + s * piece_stride + i * stride, inside, 0) != 0


# Sizes that follow the data must not compile the kernel anew.
@triton.jit(do_not_specialize=["samples", "pieces", "parts", "part_tiles", "tiles", "divisor"])
def squared_errors_kernel(
    model,  # (B, S, R)
    reference,  # (B, S, R), or None
    target,  # (B, S, R)
    mask,  # (B, S, R) of a byte each, or None
    sums,  # (SUMS, B, parts) of the arithmetic's type
    samples,
    pieces,
    length,
    parts,
    part_tiles,
    tiles,  # of a sample
    divisor,  # of the sums
    model_sample,
    model_piece,
    reference_sample,
    reference_piece,
    target_sample,
    target_piece,
    mask_sample,
    mask_piece,
    mask_stride,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    EXACT: tl.constexpr = sums.dtype.element_ty
    b = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    gap = tl.zeros((BLOCK_PIECES, BLOCK_LENGTH), dtype=EXACT)
    model_error = tl.zeros((BLOCK_PIECES, BLOCK_LENGTH), dtype=EXACT)
    reference_error = tl.zeros((BLOCK_PIECES, BLOCK_LENGTH), dtype=EXACT)
    for tile in range(part * part_tiles, tl.minimum(tiles, (part + 1) * part_tiles)):
        s, start, i, inside = _tile(tile, pieces, length, BLOCK_PIECES, BLOCK_LENGTH)
        p = _load(model, b, model_sample, model_piece, s, start, i, inside, EXACT)
        t = _load(target, b, target_sample, target_piece, s, start, i, inside, EXACT)
        kept = inside
        if mask is not None:
            kept = _kept(mask, b, mask_sample, mask_piece, mask_stride, s, start, i, inside)
        e = tl.where(kept, p - t, 0.0)
        model_error += e * e
        if reference is not None:
            r = _load(reference, b, reference_sample, reference_piece, s, start, i, inside, EXACT)
            d = tl.where(kept, p - r, 0.0)
            u = tl.where(kept, r - t, 0.0)
            gap += d * (d + 2 * u)
            reference_error += u * u
    out = sums + b * parts + part
    over = divisor.to(EXACT)
    if reference is not None:
        tl.store(out, tl.sum(tl.sum(gap, 1), 0) / over)
        last = 2 * samples.to(tl.int64) * parts
        tl.store(out + last, tl.sum(tl.sum(reference_error, 1), 0) / over)
    tl.store(out + samples.to(tl.int64) * parts, tl.sum(tl.sum(model_error, 1), 0) / over)


@triton.jit(do_not_specialize=["parts", "divisor"])
def join_parts_kernel(
    sums,  # (SUMS * B, parts)
    out,  # (SUMS * B,)
    parts,
    divisor,
    BLOCK_PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)
    each = tl.load(sums + row * parts + part, part < parts, 0.0).to(tl.float64)
    tl.store(out + row, (tl.sum(each, 0) / divisor.to(tl.float64)).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["pieces", "tiles"])
def error_gradient_kernel(
    model,  # (B, S, R)
    target,  # (B, S, R)
    mask,  # (B, S, R) of a byte each, or None
    factor,  # (B,) of the arithmetic's type
    out,  # (B, S, R)
    pieces,
    length,
    tiles,  # of a sample
    model_sample,
    model_piece,
    target_sample,
    target_piece,
    mask_sample,
    mask_piece,
    mask_stride,
    out_sample,
    out_piece,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    EXACT: tl.constexpr = factor.dtype.element_ty
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    s, start, i, inside = _tile(tile, pieces, length, BLOCK_PIECES, BLOCK_LENGTH)
    p = _load(model, b, model_sample, model_piece, s, start, i, inside, EXACT)
    t = _load(target, b, target_sample, target_piece, s, start, i, inside, EXACT)
    value = tl.load(factor + b) * (p - t)
    if mask is not None:
        kept = _kept(mask, b, mask_sample, mask_piece, mask_stride, s, start, i, inside)
        value = tl.where(kept, value, 0.0)
    first = out + b * out_sample + start
    if out.dtype.element_ty.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    tl.store(first + s * out_piece + i, value.to(out.dtype.element_ty), inside)
