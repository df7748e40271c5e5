# SPDX-License-Identifier: Apache-2.0
"""``linear_logprob`` and ``explain``: the public face of scoring."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import autograd, backends, vocab_parallel
from .backends.choice import Size
from .packing import pack
from .schedule import Plan, Problem, choose, total_memory
from .types import ScoringOptions, TokenScores, needs_statistics
from .validation import (
    check_group,
    check_ignore_index,
    check_map,
    check_outputs,
    check_tensors,
    check_vocab_range,
)


def linear_logprob(
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
    options: ScoringOptions | None = None,
) -> TokenScores:
    """Per-token log-probabilities of a linear head, without ever holding the (tokens, vocabulary)
    logits.

    With z = hidden @ weight.T + bias the logit is ``softcap * tanh(logit_scale * z / softcap) /
    temperature``, or ``logit_scale * z / temperature`` without a cap; scores follow from its
    softmax.

    Args:
        hidden: (..., H), float64, float32, bfloat16 or float16; hidden state that predicts
            ``target``. Need not be contiguous. Unscored rows are never read.
        weight: (V, H), as ``nn.Linear`` stores it. Where its dtype differs from hidden's both are
            promoted as torch does (bfloat16 with float16 to float32); under autocast the autocast
            dtype is used, unless one of them is float64. It is cast once per call.
        target: (...) int64, already shifted. A target outside [0, V) that is not ``ignore_index``
            gives NaN in its row.
        bias: (V,), or None. -inf takes an entry out of the vocabulary; under a softcap, which maps
            it to -softcap, it does not. ``mean_logits`` averages over it all the same.
        ignore_index: target of a position that is not scored.
        temperature: greater than 0.
        logit_scale: multiplies z before the cap.
        softcap: greater than 0, or None.
        outputs: fields of TokenScores to compute. ``logp``, ``entropy`` and ``lse`` are
            differentiable, for any upstream gradient; rows whose upstream gradient is 0 cost no
            backward product on CPU.
        tp_group: process group over which the vocabulary is sharded, in rank order; ``weight`` and
            ``bias`` are the local shard, ``hidden`` and ``target`` (global ids) are the same on
            every rank. Gradients of hidden are summed over the group.
        vocab_range: vocabulary ids [start, stop) of the weight's rows; rows beyond stop - start
            (padding) take no part. None: all rows, shards in rank order.
        options: see ScoringOptions.

    Returns:
        TokenScores, tensors shaped like ``target``, float32 (float64 for float64 products), 0 at
        unscored positions.

    Workspace: at most ``explain(...).workspace_bytes``. Tiles and kept exponentials stay within
    ``options.memory_budget``; on top come a few (N, H) copies of rows, seven numbers a row, a cast
    weight where one is needed, and a fixed amount for temporaries of the torch backend.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        RuntimeError: on a second derivative.
    """
    call = prepare(
        hidden,
        weight,
        target,
        bias,
        ignore_index,
        temperature,
        logit_scale,
        softcap,
        outputs,
        tp_group,
        vocab_range,
        options,
    )
    return autograd.score(call, hidden, weight, bias)


def explain(
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
    options: ScoringOptions | None = None,
) -> Plan:
    """The schedule that ``linear_logprob`` would run for the same arguments, with its cost in u and
    bytes.

    ``print(explain(...))`` gives one line. Nothing is computed.
    """
    return prepare(
        hidden,
        weight,
        target,
        bias,
        ignore_index,
        temperature,
        logit_scale,
        softcap,
        outputs,
        tp_group,
        vocab_range,
        options,
    ).plan


def prepare(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    tp_group: dist.ProcessGroup | None,
    vocab_range: tuple[int, int] | None,
    options: ScoringOptions | None,
    weight_context: autograd.WeightContext | None = None,
) -> autograd.Call:
    """The arguments checked and the schedule chosen."""
    if options is not None and not isinstance(options, ScoringOptions):
        raise TypeError(
            f"options must be a fastpref.ScoringOptions or None, got {type(options).__name__}"
        )
    options = options or ScoringOptions()
    check_tensors(hidden, weight, target, bias)
    map = check_map(temperature, logit_scale, softcap)
    outputs = check_outputs(outputs)
    check_ignore_index(ignore_index)
    check_group(tp_group)
    held = check_vocab_range(vocab_range, weight.shape[0])
    columns = weight.shape[0] if held is None else held[1] - held[0]
    shard = vocab_parallel.shard_range(tp_group, columns, hidden.device)
    target = target.to(torch.int64)
    packing = pack(target, ignore_index, options.max_scored)
    recording = torch.is_grad_enabled()
    dtype = product_dtype(hidden, weight)
    size = Size(dtype, packing.scored, weight.shape[1], shard.widest)
    name = backends.choose(options.backend, hidden.device, size)
    backend = backends.load(name)
    problem = Problem(
        scored=packing.scored,
        hidden_size=weight.shape[1],
        # Each chunk of rows has its collectives: all ranks must cut their rows alike.
        vocab_size=shard.widest,
        dtype=dtype,
        needs_hidden=recording and hidden.requires_grad,
        needs_weight=recording and weight.requires_grad,
        needs_bias=recording and bias is not None and bias.requires_grad,
        only_logp="entropy" not in outputs and "lse" not in outputs,
        casts_weight=weight.dtype != dtype,
        backend=name,
        scores_in_tiles=backend.needs_tile(dtype, write=False),
        temporary_bytes=backend.temporary_bytes(
            packing.scored, shard.widest, hidden.device.type, dtype, needs_statistics(outputs)
        ),
        total_memory=total_memory(hidden.device),
    )
    return autograd.Call(
        # A copy: backward reads it again, and a batch's labels may be overwritten until then.
        target=target.clone(),
        packing=packing,
        plan=choose(problem, options),
        map=map,
        outputs=outputs,
        start=shard.start if held is None else held[0],
        columns=columns,
        vocab_size=shard.total,
        group=tp_group,
        weight_context=weight_context,
    )


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)
