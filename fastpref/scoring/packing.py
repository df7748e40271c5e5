# SPDX-License-Identifier: Apache-2.0
"""Scored rows out of a masked batch and their results back into it.

On CPU the scored rows are gathered exactly. On CUDA their number is on the device: it is read once,
unless ``max_scored`` bounds it, the batch is one-dimensional (packed already), or a graph is being
captured; then rows beyond the scored ones are dead: zero hidden, target 0, results dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._extension import ops_unavailable_reason
from .types import in_dtype


class Packing(NamedTuple):
    total: int  # positions in the batch
    scored: int  # rows handed to the engine
    # (scored,) positions in the batch, ``total`` for dead rows; None when rows are positions
    positions: Tensor | None
    valid: Tensor | None  # (scored,) bool; None when no row is dead
    overflow: Tensor | None  # 0-dim bool: more rows were scored than ``max_scored``

    def _valid_like(self, values: Tensor) -> Tensor:
        """``valid``, one for each row of ``values``."""
        if self.valid is None:
            raise RuntimeError("no row is dead")
        return self.valid.view(-1, *[1] * (values.dim() - 1))

    def gather(self, rows: Tensor) -> Tensor:
        """(total, ...) -> (scored, ...); dead rows hold 0."""
        if self.positions is not None:
            rows = rows.index_select(
                0,
                self.positions if self.valid is None else self.positions.clamp(max=self.total - 1),
            )
        if self.valid is not None:
            # Of a number on the host ``where`` makes a copy that the host waits for, which no graph
            # can capture.
            rows = torch.where(self._valid_like(rows), rows, rows.new_zeros(()))
        return rows

    def spread(self, values: Tensor) -> Tensor:
        """(scored, ...) -> (total, ...), 0 (False) elsewhere; ``values`` itself if all are."""
        if self.valid is not None:
            values = torch.where(self._valid_like(values), values, values.new_zeros(()))
        if self.positions is None:
            return values
        # Dead rows all land in one extra slot.
        out = values.new_zeros(self.total + (self.valid is not None), *values.shape[1:])
        out.index_copy_(0, self.positions, values)
        out = out[: self.total]
        if self.overflow is not None and out.is_floating_point():
            out = torch.where(self.overflow, torch.nan, out)
        return out


def pack(
    target: Tensor,
    ignore_index: int,
    max_scored: int | None,
    count: int | None = None,
    bounded: bool = False,
) -> Packing:
    """How to pack the scored rows of ``target`` (...); ``count`` is their number where the host
    knows it, ``bounded`` forbids to ask a GPU for it."""
    if not target.is_cuda:
        return _exact(target, ignore_index, max_scored)
    flat = target.reshape(-1)
    scored, total = flat != ignore_index, flat.shape[0]
    bound = total if max_scored is None else min(max_scored, total)
    packed_already = bounded or target.dim() == 1
    packed_already = packed_already or torch.cuda.is_current_stream_capturing()
    if bound == total and (max_scored is not None or packed_already):
        return Packing(total, total, None, scored, None)
    if max_scored is None:
        index = scored.nonzero() if count is None else torch.nonzero_static(scored, size=count)
        index = index[:, 0]
        return Packing(total, index.shape[0], index, None, None)
    index = torch.nonzero_static(scored, size=bound, fill_value=total)[:, 0]
    return Packing(total, bound, index, index < total, scored.sum() > bound)


def pack_whole(target: Tensor, ignore_index: int) -> Packing:
    """All positions of ``target`` (...) are rows."""
    scored = target.reshape(-1) != ignore_index
    total = int(scored.shape[0])
    return Packing(total, total, None, scored, None)


def _exact(target: Tensor, ignore_index: int, max_scored: int | None) -> Packing:
    total = target.numel()
    if target.is_cpu and ops_unavailable_reason() is None:
        own = in_dtype(target, torch.int64).contiguous()
        index, count = torch.ops.fastpref.scored_places.default(own, ignore_index)
    else:
        index = (target.reshape(-1) != ignore_index).nonzero()[:, 0]
        count = index.shape[0]
    if max_scored is not None and count > max_scored:
        raise ValueError(
            f"max_scored must be at least the number of scored tokens: got max_scored={max_scored} "
            f"and {count} targets other than ignore_index; raise it or leave it None"
        )
    return Packing(total, count, None if count == total else index, None, None)
