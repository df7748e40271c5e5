# SPDX-License-Identifier: Apache-2.0
"""Logits of chosen vocabulary ids: a call, its forward and its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import vocab_parallel
from ..agreement import Agreed, Own, agree
from ..autograd import like, products_of
from ..head import Form, Model
from ..memory import total_memory
from ..packing import Packing
from ..plan import BUDGET_SHARE, SHORTAGE
from ..products import room_bytes, slow_reason
from ..request import Request, pack_for, told_of
from ..retry import with_less
from ..types import statistics_dtype
from . import rows as chosen_rows
from .rows import Chosen


@dataclass(frozen=True, slots=True)
class ChosenCall:
    """What is asked beside tensors."""

    request: Request
    form: Form
    start: int  # first vocabulary id of the weight
    target: Tensor | None  # (...), which positions are scored; None: all
    packing: Packing
    budget: int  # bytes

    @property
    def exact(self) -> torch.dtype:
        return statistics_dtype(self.request.dtype)


def plan_chosen(
    request: Request, model: Model, target: Tensor | None, traced: bool = False
) -> ChosenCall:
    """``target`` (...) says which positions are scored; None: all of them."""
    form, hidden, options = model.head.form, model.hidden, request.options
    own = None
    if target is None:
        total = hidden.shape[:-1].numel()
        packing = Packing(total, total, None, None, None)
    else:
        # A copy: a batch's labels may be overwritten until backward.
        own = target.to(torch.int64, copy=True)
        packing = pack_for(request, own, bounded=traced)
    agreed = _agreed(request, model, packing.scored)
    budget = options.memory_budget or agreed.memory // BUDGET_SHARE
    return ChosenCall(request, form, agreed.shard.start, own, packing, budget)


def _agreed(request: Request, model: Model, scored: int) -> Agreed:
    """What all ranks have, or this one alone where the vocabulary is not sharded."""
    head, form = model.head, model.head.form
    held = Own(head.columns, form.start, total_memory(model.hidden.device))
    if form.group is None:
        return Agreed.alone(held)
    common = {
        "function": "linear_logits",
        "dtype of products": request.dtype,
        "needed gradients": request.needed(model),
        "device": model.hidden.device.type,
        "reduce_hidden_grad": form.reducing_group is not None,
        **told_of(model),
    }
    return agree(form.group, head.weight, held, common, {"scored tokens": scored})


def run_forward(call: ChosenCall, model: Model, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """(..., K) logits, and under a cap the products and bias that they are made of."""

    def attempt(budget: int) -> tuple[Tensor, Tensor | None]:
        chosen = _chosen(call, model, ids, budget)
        raw = chosen.here.new_zeros(chosen.here.shape, dtype=call.exact)
        for x, matrix in _factors(call, model, _rows(call, model)):
            raw += chosen_rows.products(x, matrix, chosen)
        if model.head.bias is not None:
            raw += model.head.bias[chosen.index].to(call.exact).masked_fill(~chosen.here, 0)
        owned, raw = _owned(call, raw, chosen.here)
        raw = raw.masked_fill(~owned, torch.nan)
        shape = ids.shape
        logits = call.packing.spread(call.form.map.logit(raw)).view(shape)
        return logits, call.packing.spread(raw).view(shape) if call.form.map.cap else None

    with products_of(model.hidden):
        return with_less(attempt, call.budget, _less, model.hidden.device, call.form.group)


def run_backward(
    call: ChosenCall,
    model: Model,
    ids: Tensor,
    raw: Tensor | None,
    upstream: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients at each tensor of ``model``; None where none is needed."""
    needs_hidden, needs_weight, needs_bias, needs_a, needs_b = needed

    def attempt(budget: int) -> tuple[Tensor | None, ...]:
        chosen, head = _chosen(call, model, ids, budget), model.head
        d = _at_products(call, chosen, raw, upstream)
        d_weight = d_bias = d_b = d_hidden = d_a = None
        rows = _rows(call, model)
        # A row without upstream gradient gives none, whatever it holds.
        rows = rows.masked_fill((d == 0).all(1, keepdim=True), 0)
        factors = _factors(call, model, rows)
        if needs_weight:
            d_weight = chosen_rows.matrix_gradient(d, rows, head.weight, chosen)
        if needs_b and head.lora_b is not None:
            d_b = chosen_rows.matrix_gradient(d, *factors[1], chosen)
        if needs_bias and head.bias is not None:
            d_bias = torch.zeros_like(head.bias, dtype=torch.float64)
            chosen_rows.add_rows(d_bias, chosen.index.reshape(-1), d.reshape(-1).double())
        if needs_hidden or needs_a:
            wide = torch.cat([chosen_rows.row_gradient(d, one, chosen) for _, one in factors], 1)
            wide = vocab_parallel.sum_over_ranks(wide, call.form.reducing_group).to(rows.dtype)
            d_rows, d_a = head.narrowed(wide, rows, _room(call, rows))
            d_hidden = call.packing.spread(d_rows).view(model.hidden.shape)
        found = d_hidden, d_weight, d_bias, d_a, d_b
        some = (one if need else None for one, need in zip(found, needed, strict=True))
        return like(tuple(some), model.tensors)

    with model.head.opened(), products_of(model.hidden):
        return with_less(attempt, call.budget, _less, model.hidden.device, call.form.group)


def _rows(call: ChosenCall, model: Model) -> Tensor:
    """The scored rows in the products' dtype."""
    hidden = model.hidden
    return call.packing.gather(hidden.reshape(-1, hidden.shape[-1])).to(call.request.dtype)


def _factors(call: ChosenCall, model: Model, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of rows and a matrix whose products add up: one, and that of a low-rank update."""
    head = model.head
    if head.lora_b is None:
        return [(rows, head.weight)]
    wide = head.widened(rows, _room(call, rows))
    width = rows.shape[1]
    return [(wide[:, :width], head.weight), (wide[:, width:], head.lora_b)]


def _room(call: ChosenCall, rows: Tensor) -> int:
    """That of products.py."""
    slow = slow_reason(rows.dtype, rows.device)
    return 0 if slow is None else room_bytes(call.budget)


def _chosen(call: ChosenCall, model: Model, ids: Tensor, budget: int) -> Chosen:
    column = call.packing.gather(ids.reshape(-1, ids.shape[-1])) - call.start
    here = (column >= 0) & (column < model.head.columns)
    size = chosen_rows.tile_bytes(budget, ids.device)
    return Chosen(column.masked_fill(~here, 0), here, call.request.dtype, size)


def _owned(call: ChosenCall, raw: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """Which ids a rank has, and what is theirs: an id has one owner at most."""
    if call.form.group is None:
        return here, raw
    both = torch.stack([raw, here.to(raw.dtype)])
    raw, owners = vocab_parallel.sum_over_ranks(both, call.form.group)
    return owners > 0, raw


def _at_products(call: ChosenCall, chosen: Chosen, raw: Tensor | None, upstream: Tensor) -> Tensor:
    """The gradient (N, K) at products: 0 where the id is not here, whatever arrives there."""
    shape = -1, upstream.shape[-1]
    d = call.packing.gather(upstream.reshape(shape)).to(call.exact) * call.form.map.scale
    if raw is not None:
        d = d * call.form.map.slope(call.packing.gather(raw.reshape(shape)))
    return d.masked_fill(~chosen.here, 0)


def _less(budget: int) -> int | None:
    return budget // SHORTAGE if budget >= SHORTAGE else None
