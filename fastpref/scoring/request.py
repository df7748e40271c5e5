# SPDX-License-Identifier: Apache-2.0
"""One call of the engine: what is asked of which models, checked, and how it will run.

A ``Request`` follows from arguments, shapes and dtypes alone; a ``Call`` adds what depends on the
targets: which positions are scored, and by which schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._extension import warn_of_missing_operators
from . import backends, scaled
from .agreement import Agreed, Own, agree
from .backends import RowBackend
from .backends.choice import Size
from .backends.tiled import Tiled
from .head import Form, Head, Lora, Model, Shard, Sharding, Sizes, WeightContext
from .mean_logit import MeanRow
from .memory import total_memory
from .packing import Packing, pack, pack_whole
from .plan import Plan, Problem, choose
from .products import slow_reason
from .rules import Heads, Rule
from .rules.scores import Scores
from .signature import Kept
from .temperature import factor_of
from .transforms import requires_grad, without_values
from .types import ScoringOptions, in_dtype, statistics_dtype
from .validation import (
    check_basis,
    check_map,
    check_model,
    check_reduction_of_hidden,
    check_request,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked beside a rule; gradients are those of the first model."""

    dtype: torch.dtype  # of the products
    ignore_index: int
    needs_hidden: bool
    needs_weight: bool  # or the update's B
    needs_bias: bool
    options: ScoringOptions
    # All positions are rows, unscored ones dead: the values of the target decide no shape.
    whole: bool = False

    @property
    def needs_grad(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias

    def needed(self, model: Model) -> tuple[bool, ...]:
        """Of the gradients at the tensors of ``model``, which are formed."""
        updated = model.head.lora_b is not None
        return (
            self.needs_hidden,
            self.needs_weight and not updated,
            self.needs_bias,
            self.needs_hidden and updated,
            self.needs_weight and updated,
        )


class Call(NamedTuple):
    request: Request
    rule: Rule
    forms: tuple[Form, ...]  # of the models' heads
    shards: tuple[Shard, ...]
    target: Tensor  # like hidden without its last dimension
    packing: Packing
    plan: Plan
    # Like target, statistics dtype: 1 / temperature where each position has its own.
    factor: Tensor | None = None
    straight: bool = False  # whether the short way (straight.py) may serve

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.forms[0].group

    @property
    def reducing_group(self) -> dist.ProcessGroup | None:
        """Over which gradients of hidden are summed here."""
        return self.forms[0].reducing_group

    def heads(self, models: Sequence[Model], mean: MeanRow | None = None) -> Heads:
        """What multiplies and reduces the rows of ``models``, the first ones of the call; ``mean``
        where an earlier pass has made it."""
        own = tuple(
            model.head.in_dtype(self.request.dtype, shard)
            for model, shard in zip(models, self.shards, strict=False)
        )
        if mean is None and "mean_logits" in self.rule.outputs and own[0].map.cap == 0:
            mean = MeanRow.of(own[0], self.group)
        name, room = self.plan.backend, self.plan.product_room
        return Heads(own, _with_room(backends.load(name), room), name, self.group, mean, room)

    def fitted(self, heads: Heads) -> Heads:
        """``heads`` with the room that products have in the call's plan."""
        room = self.plan.product_room
        return heads._replace(backend=_with_room(heads.backend, room), room=room)

    def rows(self, model: Model) -> Tensor:
        """The scored rows of ``model`` in the products' dtype, widened by an update."""
        hidden = model.hidden
        rows = self.packing.gather(hidden.reshape(-1, hidden.shape[-1]))
        rows = in_dtype(rows, self.plan.dtype)
        return model.head.widened(rows, self.plan.product_room)

    def row_factor(self) -> Tensor | None:
        """That of each row, (N,)."""
        if self.factor is None:
            return None
        own, valid = self.packing.gather(self.factor.reshape(-1)), self.packing.valid
        return own if valid is None else own.masked_fill(~valid, 1)

    @property
    def tuned(self) -> bool:
        """Whether a verdict of ``python -m fastpref tune`` chose the backend."""
        return self.request.options.backend == "auto" and self.plan.backend == "triton"


def _with_room(backend: RowBackend, room: int) -> RowBackend:
    if isinstance(backend, Tiled) and backend.room != room:
        return Tiled(backend.kernels, room)
    return backend


def make_model(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: Lora | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    reduce_hidden_grad: bool = True,
    weight_context: WeightContext | None = None,
    weight_grad_basis: Any = None,
    prefix: str = "",
) -> Model:
    """The arguments of ``linear_logprob`` that make a model, checked; ``prefix`` stands before the
    names of its tensors where they have one.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    check_model(hidden, weight, target, bias, lora, tp_group, vocab_range, prefix)
    check_reduction_of_hidden(reduce_hidden_grad)
    basis = check_basis(weight_grad_basis, weight, lora)
    a, b, scale = (None, None, 0.0) if lora is None else lora
    form = Form(
        map=check_map(temperature, logit_scale, softcap),
        columns=None if vocab_range is None else int(vocab_range[1] - vocab_range[0]),
        start=None if vocab_range is None else int(vocab_range[0]),
        lora_scale=float(scale),
        sharding=None if tp_group is None else Sharding(tp_group, reduce_hidden_grad),
        context=weight_context,
        basis=basis,
    )
    return Model(hidden, Head(weight, bias, a, b, form))


def make_request(
    models: Sequence[Model],
    *,
    ignore_index: int,
    options: ScoringOptions | None,
) -> Request:
    """What is asked of ``models``, checked as by ``make_model``."""
    options = check_request(ignore_index, options)
    recording, dtypes = torch.is_grad_enabled(), [product_dtype(*model[:2]) for model in models]
    dtype = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)
    hidden, head = models[0]

    def needs(*tensors: Tensor | None) -> bool:
        return recording and any(one is not None and requires_grad(one) for one in tensors)

    return Request(
        dtype=dtype,
        ignore_index=int(ignore_index),
        needs_hidden=needs(hidden, head.lora_a),
        needs_weight=needs(head.weight, head.lora_b) or (recording and head.form.basis is not None),
        needs_bias=needs(head.bias),
        options=options,
        whole=without_values(hidden),
    )


def pack_for(
    request: Request, target: Tensor, count: int | None = None, bounded: bool = False
) -> Packing:
    """As ``pack``."""
    if request.whole:
        return pack_whole(target, request.ignore_index)
    return pack(target, request.ignore_index, request.options.max_scored, count, bounded)


def plan_target(
    request: Request,
    rule: Rule,
    models: Sequence[Model],
    target: Tensor,
    packing: Packing | None = None,
    traced: bool = False,
    active: float = 1.0,
    temperature: Tensor | None = None,
    kept: Kept[Planned] | None = None,
) -> Call:
    """How ``rule`` runs on the scored positions of ``target``, or on those that ``packing`` names,
    of which a share ``active`` has a gradient; ``traced`` keeps it from asking a GPU for them.
    ``temperature`` is like ``target``, where positions have their own. ``kept`` has what was found
    for the same request, rule and heads."""
    target = in_dtype(target, torch.int64)
    factor = None
    if temperature is not None:
        scored = target != request.ignore_index
        factor = factor_of(temperature, scored, statistics_dtype(request.dtype))
    if packing is None:
        packing = pack_for(request, target, bounded=traced)
    by_row = factor is not None
    # Elsewhere the host cannot look for rows without gradient.
    active = active if target.device.type == "cpu" else 1.0

    def find() -> Planned:
        return _planned(request, rule, models, packing.scored, active, by_row)

    found = find() if kept is None else kept.of((packing.scored, active, by_row), find)
    # A copy where backward reads it again: a batch's labels may be overwritten until then.
    own = target.contiguous()
    if request.needs_grad and own is target:
        own = target.clone()
    forms, shards, plan, straight = found
    return Call(request, rule, forms, shards, own, packing, plan, factor, straight)


class Planned(NamedTuple):
    """What follows from a call's signature and the number of its rows."""

    forms: tuple[Form, ...]
    shards: tuple[Shard, ...]
    plan: Plan
    straight: bool  # as in ``Call``


def _planned(
    request: Request, rule: Rule, models: Sequence[Model], scored: int, active: float, by_row: bool
) -> Planned:
    """``by_row`` says that rows have maps of their own."""
    device = models[0].hidden.device
    forms = tuple(model.head.form for model in models)
    agreed = _agreed(request, rule, models, by_row, scored)
    sizes = tuple(model.head.sizes(request.dtype) for model in models)
    # Each chunk of rows has its collectives: all ranks must cut their rows alike.
    widest, sharded = agreed.shard.widest, forms[0].group is not None
    heavy = rule.statistics or forms[0].map.cap != 0
    # Ranks may have been tuned apart, and their plans must agree. What is tuned is the product of
    # one head.
    static = len(models) > 1 or sharded
    size = Size(request.dtype, scored, sizes[0].inner, widest, heavy, static)
    backend = backends.choose(request.options.backend, device, size)
    fell_back = backend == "torch" and request.options.backend == "auto"
    if fell_back and device.type == "cpu" and not torch.compiler.is_compiling():
        warn_of_missing_operators()
    if by_row and backend == "triton":
        # Its fused kernels take one map for all rows.
        backend, _ = backends.next_tier(backend, device.type)
    capped = forms[0].map.cap != 0
    problem = sizes, scored, widest, sharded, capped, active
    plan = _plan(request, rule, *problem, backend, device, agreed)
    straight = _is_straight(request, rule, models, plan) and not by_row
    return Planned(forms, (agreed.shard,) * len(models), plan, straight)


def _agreed(
    request: Request, rule: Rule, models: Sequence[Model], by_row: bool, scored: int
) -> Agreed:
    """What all ranks have, or this one alone where the vocabulary is not sharded. Several heads
    hold the same ids on each rank."""
    hidden, head = models[0]
    form, device = head.form, hidden.device
    memory = total_memory(device)
    own = Own(head.columns, form.start, memory, slow_reason(request.dtype, device) is not None)
    if form.group is None:
        return Agreed.alone(own)
    common: dict[str, object] = {
        "options": request.options,
        "outputs": rule,
        "dtype of products": request.dtype,
        "ignore_index": request.ignore_index,
        "needed gradients": request.needed(models[0]),
        "temperatures of tokens": by_row,
        "backends": backends.available(device.type),
        "device": device.type,
        "reduce_hidden_grad": form.reducing_group is not None,
    }
    for name, model in zip(("", "second "), models, strict=False):
        common |= told_of(model, name)
    return agree(form.group, head.weight, own, common, {"scored tokens": scored})


def told_of(model: Model, name: str = "") -> dict[str, object]:
    """What must be alike of a model on every rank that holds rows of its head."""
    hidden, (weight, bias, lora_a, _, form) = model
    return {
        f"dtype of {name}hidden and weight": (hidden.dtype, weight.dtype),
        f"{name}hidden size": hidden.shape[-1],
        f"{name}bias": bias is not None,
        f"rank of {name}lora": None if lora_a is None else lora_a.shape[0],
        f"{name}temperature, logit_scale and softcap": form.map,
    }


LOGP_ALONE = Scores(("logp",), ("logp",))


def _is_straight(request: Request, rule: Rule, models: Sequence[Model], plan: Plan) -> bool:
    """Whether ``plan`` is one tile of exponentials for the logp of one head, on CPU, of all columns
    and in the dtype that everything has."""
    hidden, head = models[0]
    columns, dtype = head.weight.shape[0], request.dtype
    if rule != LOGP_ALONE or plan.backend != "cpp" or plan.widens or dtype == torch.float16:
        return False
    if head.form != Form(map=head.form.map) or head.lora_a is not None or request.needs_bias:
        return False
    if (hidden.dtype, head.weight.dtype) != (dtype, dtype) or not 0 < plan.scored:
        return False
    whole = plan.kept_rows == plan.scored or plan.forward_tile == (plan.scored, columns)
    return whole and not request.whole and plan.schedule in ("score", "direct", "keep")


def _plan(
    request: Request,
    rule: Rule,
    heads: tuple[Sizes, ...],
    scored: int,
    vocab_size: int,
    sharded: bool,
    capped: bool,
    active: float,
    backend: str,
    device: torch.device,
    agreed: Agreed,
) -> Plan:
    dtype, head, serving = request.dtype, heads[0], backends.load(backend)
    partner = heads[1] if len(heads) > 1 else None
    means = "mean_logits" in rule.outputs and "mean_logits" in rule.differentiable
    problem = Problem(
        scored=scored,
        hidden_size=head.inner,
        trained_size=head.trained,
        projected_size=head.rank,
        partner_size=0 if partner is None else partner.inner,
        matrices=rule.matrices,
        formed_again=rule.formed_again,
        vocab_size=vocab_size,
        dtype=dtype,
        needs_hidden=request.needs_hidden,
        needs_weight=request.needs_weight,
        needs_bias=request.needs_bias,
        only_logp=set(rule.differentiable) <= ({"logp"} if capped else {"logp", "mean_logits"}),
        copies_weight=head.copies_weight,
        active=active,
        mixes=rule.mixes,
        sharded=sharded,
        copies_partner=partner is not None and partner.copies_weight,
        backend=backend,
        device_type=device.type,
        scores_in_tiles=partner is not None or serving.needs_tile(dtype, write=False),
        temporary_bytes=serving.temporary_bytes(
            scored, vocab_size, device.type, dtype, rule.statistics
        )
        + (scaled.temporary_bytes(dtype) if request.needs_grad and means else 0),
        total_memory=agreed.memory,
        widens=agreed.widens and isinstance(serving, Tiled),
    )
    return choose(problem, request.options)


def product_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, head.weight.dtype):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, head.weight.dtype)
