# SPDX-License-Identifier: Apache-2.0
"""The engine's two passes (forward.py, backward.py) where nothing is left to choose while they run:
log-probabilities of one head on CPU, all rows in one tile of all columns.

For a hundred rows of a small head what those decide for any rule, tiles and gradient takes longer
than their products. Here one operator stands behind each product and one before those of the
gradients; results are the same bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import workspace
from .forward import Kept
from .head import Model
from .packing import Packing
from .request import Call
from .rules import Upstream
from .statistics import OUTPUTS
from .types import in_dtype, statistics_dtype
from .workspace import lease

# Of the numbers that ``score_batch_`` returns.
LOGP, ANCHOR, NORM, SCALE = 5, 6, 7, 9
OTHERS = (None,) * (len(OUTPUTS) - 1)  # beside logp, the first


def serves(call: Call, model: Model) -> bool:
    """Whether operators read the model's tensors as they lie."""
    return call.straight and model.hidden.is_contiguous() and model.head.weight.is_contiguous()


def forward(call: Call, model: Model) -> tuple[tuple[Tensor | None, ...], Kept]:
    """The rule's outputs, like the target, and what backward needs."""
    packing, plan, target, map = call.packing, call.plan, call.target, call.forms[0].map
    weight, bias, *_ = model.head
    workspace.begin_pass()
    rows = _rows(packing, model.hidden)
    tile = lease((rows.shape[0], weight.shape[0]), plan.dtype, weight.device)
    torch.mm(rows, weight.t(), out=tile)
    if bias is not None:
        bias = in_dtype(bias, statistics_dtype(plan.dtype)).contiguous()
    logp, found = torch.ops.fastpref.score_batch_(
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
    if not plan.needs_grad:
        return (logp, *OTHERS), Kept(target, ())
    numbers = found[LOGP], found[ANCHOR], found[NORM], found[SCALE], None
    own = packing.gather(target.view(-1))
    if plan.schedule == "direct":
        kept = Kept(own, numbers, direct=(torch.mm(tile, weight),))
    else:
        kept = Kept(own, numbers, (tile,))
    return (logp, *OTHERS), kept


def backward(
    call: Call, model: Model, kept: Kept, upstream: Upstream
) -> tuple[Tensor | None, ...] | None:
    """Gradients at each tensor of the model; None where rows are without a gradient, or what was
    kept is given back."""
    packing, plan, scale = call.packing, call.plan, call.forms[0].map.scale
    hidden, weight, numbers = model.hidden, model.head.weight, kept.numbers[3]
    given, ours = upstream[0], torch.ops.fastpref
    held = kept.direct or kept.matrices
    if given is None or numbers is None or not held or held[0].shape[0] != plan.scored:
        return None
    given = in_dtype(given.reshape(-1), numbers.dtype).contiguous()
    factor, active = ours.gradient_factors(given, numbers, scale, packing.positions)
    if active != plan.scored:
        return None
    d_weight = None
    if kept.direct:
        d_rows = torch.empty_like(held[0])
        ours.scale_rows_(d_rows, held[0], factor)
    else:
        d_rows, rows = None, _rows(packing, hidden)
        scaled = torch.empty_like(rows)
        if plan.needs_weight:
            ours.scale_rows_(scaled, rows, factor)
            d_weight = torch.mm(held[0].t(), scaled)
        if plan.needs_hidden:
            d_rows = torch.mm(held[0], weight, out=scaled)
            ours.scale_rows_(d_rows, d_rows, factor)
    d_hidden = None if d_rows is None else packing.spread(d_rows).view(hidden.shape)
    return d_hidden, d_weight, None, None, None


def _rows(packing: Packing, hidden: Tensor) -> Tensor:
    return packing.gather(hidden.view(-1, hidden.shape[-1]))
