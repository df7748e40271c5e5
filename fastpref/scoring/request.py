# SPDX-License-Identifier: Apache-2.0
"""One call of scoring: what was asked for, checked, and how it will run.

A ``Request`` follows from arguments, shapes and dtypes alone; a ``Call`` adds what depends on the
targets: which positions are scored, and by which schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)

from . import backends, vocab_parallel
from .backends import RowBackend
from .backends.choice import Size
from .mean_logit import MeanRow
from .packing import Packing, pack
from .schedule import Plan, Problem, choose, total_memory
from .types import (
    DIFFERENTIABLE,
    Head,
    LogitMap,
    ScoringOptions,
    needs_statistics,
    statistics_dtype,
)
from .validation import (
    check_group,
    check_ignore_index,
    check_lora,
    check_map,
    check_options,
    check_outputs,
    check_tensors,
    check_vocab_range,
)
from .vocab_parallel import Shard

# Entered around every use of weight and bias in backward: ZeRO-3 gathers partitioned parameters
# here.
WeightContext = Callable[[Tensor, Tensor | None], AbstractContextManager[Any]]
Lora = tuple[Tensor, Tensor, float]


class Parameters(NamedTuple):
    """Of a head, with the low-rank update scale B A of its weight where there is one."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    lora_a: Tensor | None = None  # A, (r, H)
    lora_b: Tensor | None = None  # B, (V, r)

    @property
    def inner_size(self) -> int:
        """Of the products: H, with an update H + r."""
        rank = 0 if self.lora_a is None else self.lora_a.shape[0]
        return self.weight.shape[1] + rank

    @property
    def trained_size(self) -> int:
        """How many inner columns can have a weight gradient: an update leaves the weight frozen."""
        return self.weight.shape[1] if self.lora_a is None else self.lora_a.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    dtype: torch.dtype  # of the products
    ignore_index: int
    map: LogitMap
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...]  # outputs that can receive a gradient
    needs_hidden: bool
    needs_weight: bool  # or the update's B
    needs_bias: bool
    columns: int | None  # rows of the weight in use; None: all
    start: int | None  # first vocabulary id of the weight; None: shards in rank order
    lora_scale: float
    options: ScoringOptions
    group: dist.ProcessGroup | None = None
    weight_context: WeightContext | None = None

    @property
    def needs_grad(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias

    @property
    def heavy(self) -> bool:
        """Whether a fused epilogue has more to do than to add up exponentials."""
        return needs_statistics(self.outputs) or self.map.cap != 0

    def columns_of(self, parameters: Parameters) -> int:
        """Rows of the weight in use."""
        return parameters.weight.shape[0] if self.columns is None else self.columns

    def needed(self, parameters: Parameters) -> tuple[bool, ...]:
        """Of the gradients at hidden and each of the parameters, which are formed."""
        updated = parameters.lora_b is not None
        return (
            self.needs_hidden,
            self.needs_weight and not updated,
            self.needs_bias,
            self.needs_hidden and updated,
            self.needs_weight and updated,
        )

    # A request as arguments of an operator, in the order of FIELDS.
    FIELDS: ClassVar[tuple[str, ...]] = (
        "dtype",
        "ignore_index",
        "scale",
        "cap",
        "outputs",
        "differentiable",
        "needs_hidden",
        "needs_weight",
        "needs_bias",
        "columns",
        "start",
        "lora_scale",
        "backend",
        "memory_budget",
        "schedule",
        "chunk_rows",
        "max_scored",
        "group",
    )
    SCHEMA: ClassVar[str] = (
        "ScalarType dtype, int ignore_index, float scale, float cap, str outputs, "
        "str differentiable, bool needs_hidden, bool needs_weight, bool needs_bias, int? columns, "
        "int? start, float lora_scale, str backend, int? memory_budget, str schedule, "
        "int? chunk_rows, int? max_scored, str? group"
    )

    @property
    def settings(self) -> tuple[Any, ...]:
        """By these the other side of an operator knows the request again."""
        options = self.options
        return (
            self.dtype,
            self.ignore_index,
            self.map.scale,
            self.map.cap,
            ",".join(self.outputs),
            ",".join(self.differentiable),
            self.needs_hidden,
            self.needs_weight,
            self.needs_bias,
            self.columns,
            self.start,
            self.lora_scale,
            options.backend,
            options.memory_budget,
            options.schedule,
            options.chunk_rows,
            options.max_scored,
            None if self.group is None else self.group.group_name,
        )

    @classmethod
    def of(cls, settings: Sequence[Any]) -> Request:
        given = dict(zip(cls.FIELDS, settings, strict=True))
        options = ScoringOptions(
            **{
                name: given.pop(name)
                for name in ("backend", "memory_budget", "schedule", "chunk_rows", "max_scored")
            }
        )
        map = LogitMap(given.pop("scale"), given.pop("cap"))
        group = given.pop("group")
        for name in ("outputs", "differentiable"):
            given[name] = tuple(filter(None, given[name].split(",")))
        if group is not None:
            group = _resolve_process_group(group)
        return cls(**given, map=map, options=options, group=group)


@dataclass(frozen=True, slots=True)
class Call:
    request: Request
    target: Tensor  # like hidden without its last dimension
    packing: Packing
    plan: Plan
    shard: Shard

    def head(self, parameters: Parameters) -> Head:
        """In the products' dtype; an update widens the weight's rows by those of B."""
        request, dtype = self.request, self.request.dtype
        used = slice(request.columns)
        weight, bias = parameters.weight[used].to(dtype), parameters.bias
        trained = 0
        if parameters.lora_b is not None:
            trained = weight.shape[1]
            weight = torch.cat([weight, parameters.lora_b[used].to(dtype)], dim=1)
        if bias is not None:
            bias = bias[used].to(statistics_dtype(dtype)).contiguous()
        start = self.shard.start if request.start is None else request.start
        return Head(weight, bias, request.map, start, self.shard.total, trained)

    def mean_row(self, head: Head) -> MeanRow | None:
        """What mean logits are formed with, where they are asked for and linear."""
        if "mean_logits" not in self.request.outputs or head.map.cap != 0:
            return None
        return MeanRow.of(head, self.request.group)

    @property
    def backend(self) -> RowBackend:
        return backends.load(self.plan.backend)

    @property
    def tuned(self) -> bool:
        """Whether a verdict of ``python -m fastpref tune`` chose the backend."""
        return self.request.options.backend == "auto" and self.plan.backend == "triton"


def prepare(
    hidden: Tensor, weight: Tensor, target: Tensor, **arguments: Any
) -> tuple[Call, Parameters]:
    """The arguments of ``make_request`` checked and the schedule chosen."""
    request, parameters = make_request(hidden, weight, target, **arguments)
    return plan_target(request, hidden, parameters, target), parameters


def make_request(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = ("logp",),
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    lora: Lora | None = None,
    options: ScoringOptions | None = None,
    differentiable: tuple[str, ...] = DIFFERENTIABLE,
    weight_context: WeightContext | None = None,
    prefix: str = "",
) -> tuple[Request, Parameters]:
    """The arguments of ``linear_logprob``, checked; ``differentiable`` are the outputs that can
    receive a gradient, ``prefix`` stands before the names of the tensors where they have one.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    options = check_options(options)
    check_tensors(hidden, weight, target, bias, prefix)
    scale = check_lora(lora, weight, prefix)
    parameters = Parameters(weight, bias, *(() if lora is None else lora[:2]))
    map = check_map(temperature, logit_scale, softcap)
    outputs = check_outputs(outputs)
    check_ignore_index(ignore_index)
    check_group(tp_group)
    held = check_vocab_range(vocab_range, weight.shape[0])
    recording = torch.is_grad_enabled()

    def needs(*tensors: Tensor | None) -> bool:
        return recording and any(one is not None and one.requires_grad for one in tensors)

    request = Request(
        dtype=product_dtype(hidden, weight),
        ignore_index=ignore_index,
        map=map,
        outputs=outputs,
        differentiable=tuple(name for name in differentiable if name in outputs),
        needs_hidden=needs(hidden, parameters.lora_a),
        needs_weight=needs(weight, parameters.lora_b),
        needs_bias=needs(bias),
        columns=None if held is None else held[1] - held[0],
        start=None if held is None else held[0],
        lora_scale=scale,
        options=options,
        group=tp_group,
        weight_context=weight_context,
    )
    return request, parameters


def plan_target(
    request: Request, hidden: Tensor, parameters: Parameters, target: Tensor, traced: bool = False
) -> Call:
    """How ``request`` runs; ``traced`` keeps it from asking a GPU for the scored positions."""
    target = target.to(torch.int64)
    options = request.options
    packing = pack(target, request.ignore_index, options.max_scored, bounded=traced)
    return plan_call(request, hidden, parameters, target, packing)


def plan_call(
    request: Request,
    hidden: Tensor,
    parameters: Parameters,
    target: Tensor,
    packing: Packing,
    tuned: bool = True,
) -> Call:
    """How ``request`` runs on the positions that ``packing`` names; ``tuned`` lets ``auto`` heed
    what was tuned on this machine."""
    columns = request.columns_of(parameters)
    shard = vocab_parallel.shard_range(request.group, columns, hidden.device)
    problem = make_problem(request, hidden, parameters, packing.scored, shard, tuned)
    plan = choose(problem, request.options)
    # A copy: backward reads it again, and a batch's labels may be overwritten until then.
    return Call(request, target.clone(), packing, plan, shard)


def make_problem(
    request: Request,
    hidden: Tensor,
    parameters: Parameters,
    scored: int,
    shard: Shard,
    tuned: bool,
) -> Problem:
    dtype, device = request.dtype, hidden.device
    # Ranks may have been tuned apart, and their plans must agree: each chunk has its collectives.
    static = not tuned or request.group is not None
    size = Size(dtype, scored, parameters.inner_size, shard.widest, request.heavy, static)
    name = backends.choose(request.options.backend, device, size)
    backend = backends.load(name)
    return Problem(
        scored=scored,
        hidden_size=parameters.inner_size,
        trained_size=parameters.trained_size,
        # Each chunk of rows has its collectives: all ranks must cut their rows alike.
        vocab_size=shard.widest,
        dtype=dtype,
        needs_hidden=request.needs_hidden,
        needs_weight=request.needs_weight,
        needs_bias=request.needs_bias,
        only_logp=set(request.differentiable) <= {"logp"},
        copies_weight=parameters.weight.dtype != dtype or parameters.lora_b is not None,
        backend=name,
        device_type=device.type,
        scores_in_tiles=backend.needs_tile(dtype, write=False),
        temporary_bytes=backend.temporary_bytes(
            scored, shard.widest, device.type, dtype, needs_statistics(request.outputs)
        ),
        total_memory=total_memory(device),
    )


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)
