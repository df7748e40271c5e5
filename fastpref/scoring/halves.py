# SPDX-License-Identifier: Apache-2.0
"""Where a product in float16 passes 65504.

The tile then holds an infinity. A target's logit is known all the same, from a dot product in
float32, so that its place in the tile need not be; of any other column an infinity above makes the
row NaN, as in plain torch, and one below counts as no probability. That is wrong only in rows whose
logits all lie as low; those become NaN too. Their normaliser tells which they are, unless logits
are scaled down so far that all there can be lie close together; then the tile is looked through.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .head import Projector
from .slab import Products
from .statistics import RowScores, RowSums
from .types import LogitMap

LARGEST = torch.finfo(torch.float16).max
# What weighs less, in nats, than this beside a row's normaliser does not show in float32.
_UNSEEN = 20.0
# Logits of a range, in nats, of which that is a small part.
_WIDE = 1024.0


class Clipped(NamedTuple):
    """Targets whose products were brought back into range, each (rows,)."""

    rows: Tensor  # bool, which
    target: Tensor
    logit: Tensor
    place: tuple[Tensor, Tensor]  # in the tile
    product: Tensor  # what was there

    def put_back(self, tile: Tensor) -> None:
        tile.index_put_(self.place, self.product)

    def corrected(self, sums: RowSums) -> RowSums:
        """Statistics of a row about the target's logit where it is the largest."""
        best, weighted, index = sums.best, sums.weighted, sums.best_index
        if best is None or weighted is None or index is None:
            return sums
        raised = self.rows & (self.logit > best)
        top = torch.where(raised, self.logit, best)
        # Without weight the difference may be infinite.
        shift = torch.where(raised & (sums.sum > 0), (best - top) * sums.sum, 0.0)
        return sums._replace(
            best=top,
            best_index=torch.where(raised, self.target, index),
            weighted=weighted + shift,
        )


def _range(map: LogitMap, like: Tensor) -> float | Tensor:
    """How far, in nats, the logits of products in range reach: of all rows, or (rows,) as ``like``
    is."""
    rate = map.rate(like)
    return LARGEST * (rate.abs() if isinstance(rate, Tensor) else abs(rate))


def lost_products(products: Products) -> Tensor | None:
    """(rows,) bool, rows with any; None where the normaliser will tell. Targets are in range."""
    narrow = _range(products.map, products.tile[:, 0]) < _WIDE
    if products.map.cap != 0 or narrow is False:
        return None
    low, high = products.tile.aminmax(dim=1)
    return (low.isinf() | high.isinf()) & narrow


def clip_targets(products: Products, target: Tensor, logit: Tensor) -> Clipped:
    """The products of targets whose ``logit`` is finite, into range, in the tile."""
    tile = products.tile
    here = (target >= 0) & (target < tile.shape[1])
    place = (
        torch.arange(tile.shape[0], dtype=torch.int64, device=tile.device),
        target.clamp(0, tile.shape[1] - 1),
    )
    own = tile[place]
    rows = here & own.isinf() & logit.isfinite()
    tile.index_put_(place, torch.where(rows, own.clamp(-LARGEST, LARGEST), own))
    return Clipped(rows, target, logit, place, own)


def without_lost_rows(
    rows: RowScores, scale: Tensor, head: Projector, group: dist.ProcessGroup | None
) -> tuple[RowScores, Tensor]:
    """Scores and the scale of exponentials, NaN where products may have passed -65504 that weigh:
    where all columns there would show beside the row's normaliser."""
    reach = _range(head.map, rows.logp)
    wide = reach >= _WIDE
    if head.map.cap != 0 or wide is False:
        return rows, scale
    bias = rows.logp.new_zeros(1) if head.bias is None else head.bias * head.map.scale
    # A bias of -inf excludes, whatever the product.
    top = torch.where(bias.isinf(), -torch.inf, bias).amax()
    if group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    if head.map.factor is not None:
        top = top * head.map.factor
    limit = top - reach + (math.log(head.vocab_size) + _UNSEEN)
    lost = (rows.anchor + rows.log_norm < limit) & wide
    logp, norm, log_norm, scale = (
        torch.where(lost, torch.nan, one) for one in (rows.logp, rows.norm, rows.log_norm, scale)
    )
    return RowScores(logp, rows.anchor, norm, log_norm), scale
