# SPDX-License-Identifier: Apache-2.0
"""The short way of a call that leaves nothing to choose while it runs: log-probabilities of one
head on CPU, all rows in one tile of all columns.

For a hundred rows of a small head what the engine decides for any rule, tiles and gradient takes
longer than their products. Here one operator stands behind each product and one before those of the
gradients. What may come otherwise is the engine's: rows without a gradient, batches of gradients,
second derivatives, and memory that ran out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, workspace
from .autograd import Outputs, differentiate
from .forward import Kept
from .head import Head, Model
from .packing import Packing
from .request import Call
from .statistics import OUTPUTS
from .transforms import Differentiable, plain
from .types import in_dtype, statistics_dtype
from .workspace import lease

# Of the numbers that ``score_batch_`` returns.
LOGP, ANCHOR, NORM, SCALE = 5, 6, 7, 9
OTHERS = (None,) * (len(OUTPUTS) - 1)  # beside logp, the first


def run(call: Call, models: Sequence[Model]) -> Outputs:
    """The outputs of ``call.rule``, by the short way where it serves."""
    failed = None
    if call.straight:
        hidden, (weight, bias, *_) = models[0]
        if _readable(hidden, weight):
            try:
                return _logp(call, hidden, weight, bias), *OTHERS
            except torch.OutOfMemoryError as error:
                failed = error
    try:
        return autograd.run(call, models, failed)
    finally:
        failed = None  # Its traceback holds this frame.


def _readable(hidden: Tensor, weight: Tensor) -> bool:
    """Whether operators read both as they lie, and know them."""
    contiguous = hidden.is_contiguous() and weight.is_contiguous()
    return contiguous and forward_ad._current_level < 0


def _logp(call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if call.request.needs_grad:
        logp: Tensor = Straight.apply(call, hidden, weight, bias)  # type: ignore[no-untyped-call]
        return logp
    with torch.no_grad():
        return score(call, hidden, weight, bias).logp


class Scored(NamedTuple):
    logp: Tensor  # like the target
    tile: Tensor  # (N, V), exponentials where there is to be a gradient
    numbers: Tensor  # (numbers, N), of ``score_batch_``


def score(call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Scored:
    """The forward pass."""
    packing, plan, target, map = call.packing, call.plan, call.target, call.forms[0].map
    workspace.begin_pass()
    rows = _rows(packing, hidden)
    tile = lease((rows.shape[0], weight.shape[0]), plan.dtype, weight.device)
    torch.mm(rows, weight.t(), out=tile)
    if bias is not None:
        bias = in_dtype(bias, statistics_dtype(plan.dtype)).contiguous()
    logp, numbers = torch.ops.fastpref.score_batch_(
        tile,
        rows,
        weight,
        target,
        packing.positions,
        bias,
        map.scale,
        map.cap,
        plan.needs_grad,
    )
    return Scored(logp, tile, numbers)


def _rows(packing: Packing, hidden: Tensor) -> Tensor:
    return packing.gather(hidden.view(-1, hidden.shape[-1]))


class Straight(Differentiable):
    @staticmethod
    def forward(
        ctx: Any, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        logp, held, numbers = score(call, hidden, weight, bias)
        if call.plan.schedule == "direct":
            held = torch.mm(held, weight)
        ctx.save_for_backward(hidden, weight, bias, held, numbers)
        ctx.call = call
        return logp

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None
        call: Call = ctx.call
        hidden, weight, bias, held, numbers = ctx.saved_tensors
        failed = None
        if plain(upstream) and not torch.is_grad_enabled():
            try:
                found = gradients(call, hidden, weight, held, numbers, upstream)
            except torch.OutOfMemoryError as error:
                found, failed = None, error
            if found is not None:
                return None, *found, None
        model = Model(hidden, Head(weight, bias, None, None, call.forms[0]))
        direct = call.plan.schedule == "direct"
        kept = Kept(
            call.packing.gather(call.target.view(-1)),
            (numbers[LOGP], numbers[ANCHOR], numbers[NORM], numbers[SCALE], None),
            matrices=() if direct else (held,),
            direct=(held,) if direct else (),
        )
        given = upstream, *OTHERS
        try:
            d_hidden, d_weight, *_ = differentiate(call, [model], kept, given, failed=failed)
        finally:
            failed = None  # Its traceback holds this frame.
        return None, d_hidden, d_weight, None


def gradients(
    call: Call, hidden: Tensor, weight: Tensor, held: Tensor, numbers: Tensor, upstream: Tensor
) -> tuple[Tensor | None, Tensor | None] | None:
    """At hidden and weight, as ``backward`` forms them; None where rows are without a gradient, or
    what was kept is given back."""
    packing, plan, scale = call.packing, call.plan, call.forms[0].map.scale
    ours = torch.ops.fastpref
    given = in_dtype(upstream.reshape(-1), numbers.dtype).contiguous()
    factor, active = ours.gradient_factors(given, numbers[SCALE], scale, packing.positions)
    if active != plan.scored or held.shape[0] != plan.scored:
        return None
    d_weight = None
    if plan.schedule == "direct":
        d_rows = torch.empty_like(held)
        ours.scale_rows_(d_rows, held, factor)
    else:
        d_rows, rows = None, _rows(packing, hidden)
        scaled = torch.empty_like(rows)
        if plan.needs_weight:
            ours.scale_rows_(scaled, rows, factor)
            d_weight = torch.mm(held.t(), scaled)
        if plan.needs_hidden:
            d_rows = torch.mm(held, weight, out=scaled)
            ours.scale_rows_(d_rows, d_rows, factor)
    d_hidden = None if d_rows is None else packing.spread(d_rows).view(hidden.shape)
    return d_hidden, d_weight
