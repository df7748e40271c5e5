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
from .request import Call
from .statistics import OUTPUTS
from .types import in_dtype, statistics_dtype
from .workspace import lease

# Of the numbers that ``score_batch_`` returns.
LOGP, ANCHOR, NORM, SCALE = 5, 6, 7, 9
OTHERS = (None,) * (len(OUTPUTS) - 1)  # beside logp, the first


def serves(call: Call, model: Model) -> bool:
    """Whether operators read the model's tensors as they lie."""
    return call.straight and model.hidden.is_contiguous() and model.head.weight.is_contiguous()


def forward(
    call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs like the target, the numbers of the rows, and their exponentials, with the schedule
    "direct" times the weight."""
    packing, plan, map = call.packing, call.plan, call.forms[0].map
    workspace.begin_pass()
    rows = packing.gather(hidden.view(-1, hidden.shape[-1]))
    tile = lease((rows.shape[0], weight.shape[0]), plan.dtype, weight.device)
    torch.mm(rows, weight.t(), out=tile)
    if bias is not None:
        bias = in_dtype(bias, statistics_dtype(plan.dtype)).contiguous()
    logp, numbers = torch.ops.fastpref.score_batch_.default(
        tile,
        rows,
        weight,
        call.target,
        packing.positions,
        bias,
        map.scale,
        map.cap,
        plan.needs_grad,
    )
    return logp, numbers, torch.mm(tile, weight) if plan.schedule == "direct" else tile


def kept(call: Call, numbers: Tensor, matrix: Tensor) -> Kept:
    """The same as the engine's backward takes it."""
    own = call.packing.gather(call.target.view(-1))
    found = numbers[LOGP], numbers[ANCHOR], numbers[NORM], numbers[SCALE], None
    direct = call.plan.schedule == "direct"
    return Kept(own, found, () if direct else (matrix,), (matrix,) if direct else ())


def backward(
    call: Call, hidden: Tensor, weight: Tensor, numbers: Tensor, matrix: Tensor, d_logp: Tensor
) -> tuple[Tensor | None, Tensor | None] | None:
    """Gradients at hidden and weight; None where rows are without a gradient, what was kept is
    given back, or something does not lie as the operators read it."""
    packing, plan, scale = call.packing, call.plan, call.forms[0].map.scale
    places, ours = packing.positions, torch.ops.fastpref
    # What was saved may come back otherwise, through hooks of the caller's.
    as_it_was = hidden.is_contiguous() and matrix.is_contiguous()
    if matrix.shape[0] != plan.scored or not as_it_was:
        return None
    direct = plan.schedule == "direct"
    factor, scaled, active = ours.gradient_rows.default(
        in_dtype(d_logp, numbers.dtype), numbers, matrix if direct else hidden, places, scale
    )
    if active != plan.scored:
        return None
    if direct:
        return packing.spread(scaled).view(hidden.shape), None
    d_hidden = d_weight = None
    if plan.needs_weight:
        d_weight = torch.mm(matrix.t(), scaled)
    if plan.needs_hidden:
        d_rows = torch.mm(matrix, weight, out=scaled)
        if places is None:
            ours.scale_rows_.default(d_rows, d_rows, factor)
            d_hidden = d_rows.view(hidden.shape)
        else:
            d_hidden = torch.empty_like(hidden)
            ours.spread_rows_.default(d_hidden, d_rows, factor, places)
    return d_hidden, d_weight
