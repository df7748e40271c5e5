# SPDX-License-Identifier: Apache-2.0
"""Tensors of one shape (B, ...) as a kernel walks them: views (B, S, R), where a sample is S pieces
of R elements that lie next to each other.

What has dense strides is one piece: contiguous, channels_last, a batch that is expanded, samples
that lie apart. Several pieces serve a batch that is not outermost in memory, a part of each
sample, and a mask that is broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import Tensor


class Walk(NamedTuple):
    """Tensors in the order of memory of the first."""

    tensors: list[Tensor]  # as they came, or copies that lie as the first does
    views: list[Tensor]  # (B, S, R) of these, elements of a piece next to each other
    mask: Tensor | None  # (B, S, R), any strides


def walk(tensors: Sequence[Tensor], mask: Tensor | None = None) -> Walk:
    """How ``tensors`` of one shape (B, ...), with an element at least, are walked together.

    Args:
        tensors: those that do not lie as the first does are copied, and the first where it lies in
            more pieces than a view has.
        mask: broadcasts to them.
    """
    first = tensors[0]
    if mask is None and all(one.is_contiguous() for one in tensors):
        return Walk(list(tensors), [one.view(one.shape[0], 1, -1) for one in tensors], None)
    order = sorted(range(1, first.dim()), key=first.stride, reverse=True)
    fitting: list[Tensor] = []
    for one in tensors:
        fits = _pieces([*fitting, one], order) is not None
        fitting.append(one if fits else _dense(one, order))
    every = fitting
    if mask is not None:
        expanded = mask.expand(first.shape)
        fits = _pieces(fitting, order, expanded) is not None
        every = [*fitting, expanded if fits else _dense(expanded, order)]
    # There are some: dense tensors of one order fit any other.
    pieces = cast(_Pieces, _pieces(fitting, order, *every[len(fitting) :]))
    views = [
        one.as_strided((one.shape[0], *pieces.shape), (one.stride(0), *strides))
        for one, strides in zip(every, pieces.strides, strict=True)
    ]
    return Walk(fitting, views[: len(fitting)], views[-1] if mask is not None else None)


class _Pieces(NamedTuple):
    shape: tuple[int, int]  # S, R
    strides: list[tuple[int, int]]  # of each tensor


def _pieces(tensors: Sequence[Tensor], order: Sequence[int], *mask: Tensor) -> _Pieces | None:
    """Of a sample of all of these, or None where there is no such view. Elements of a piece of
    ``tensors`` lie next to each other, those of a mask anywhere."""
    every = [*tensors, *mask]
    levels: list[tuple[int, tuple[int, ...]]] = []
    for dim in order:
        size, strides = every[0].shape[dim], tuple(one.stride(dim) for one in every)
        if size == 1:
            continue
        if levels:
            whole, outer = levels[-1]
            if all(far == near * size for far, near in zip(outer, strides, strict=True)):
                levels[-1] = whole * size, strides
                continue
        levels.append((size, strides))
    if len(levels) > 2 or (levels and set(levels[-1][1][: len(tensors)]) != {1}):
        return None
    length, inner = levels.pop() if levels else (1, (1,) * len(every))
    # A piece alone lies as a contiguous view's does: kernels are compiled for strides' alignment.
    pieces, outer = levels.pop() if levels else (1, tuple(length * stride for stride in inner))
    return _Pieces((pieces, length), list(zip(outer, inner, strict=True)))


def _dense(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A copy whose samples are dense, their dimensions in that order."""
    order = [0, *order]
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)
