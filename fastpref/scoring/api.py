# SPDX-License-Identifier: Apache-2.0
"""``linear_logprob``: the public face of scoring."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import autograd, operators
from .request import Lora, make_request, plan_target
from .types import ScoringOptions, TokenScores


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
    lora: Lora | None = None,
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
            it to -softcap, it does not.
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
        lora: (A, B, scale), A (r, H), B (V, r): the head's weight is weight + scale B A, which is
            never formed. Gradients go to A and B; ``weight`` must not need one. Costs a copy of the
            weight widened by r columns. Hu et al., arXiv:2106.09685.

    Returns:
        TokenScores, tensors shaped like ``target``, float32 (float64 for float64 products), 0 at
        unscored positions.

    Workspace: at most ``explain(...).workspace_bytes``. Tiles and kept exponentials stay within
    ``options.memory_budget``; on top come a few (N, H) copies of rows, seven numbers a row, a cast
    weight where one is needed, and a fixed amount for temporaries of the torch backend. Where
    memory runs out, in forward or in backward, the call runs again with less, see ScoringOptions;
    backward then gives kept exponentials back and recomputes their rows.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        RuntimeError: on a second derivative.
        torch.OutOfMemoryError: where even the least tile does not fit.
    """
    request, parameters = make_request(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        outputs=outputs,
        tp_group=tp_group,
        vocab_range=vocab_range,
        lora=lora,
        options=options,
    )
    if torch.compiler.is_compiling():
        return operators.score(request, hidden, parameters, target)
    call = plan_target(request, hidden, parameters, target)
    return autograd.score(call, hidden, parameters)
