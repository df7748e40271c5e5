# SPDX-License-Identifier: Apache-2.0
"""``linear_logits``: the logits of chosen vocabulary ids."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..agreement import refused_together
from ..head import Lora, Model, WeightContext, opened
from ..request import Request, make_model, make_request
from ..sharded import local_parts
from ..temperature import check_temperature, factor_of
from ..types import ScoringOptions, statistics_dtype
from ..validation import check_ids
from . import autograd, operators
from .passes import plan_chosen

_NONE_IGNORED = -100  # no position is left out


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    options: ScoringOptions | None = None,
    lora: Lora | None = None,
    weight_context: WeightContext | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """The logits of chosen vocabulary ids, K for each hidden state, at the cost of gathering K rows
    of the weight: no product with the whole of it, and never more gathered rows in memory than the
    budget holds.

    Logits are those of ``linear_logprob``: with z = hidden @ weight.T + bias, ``softcap *
    tanh(logit_scale * z / softcap) / temperature``, or ``logit_scale * z / temperature`` without a
    cap. Differentiable with respect to hidden, weight, bias and lora, for any upstream gradient.

    Args:
        hidden: (..., H), float64, float32, bfloat16 or float16.
        weight: (V, H). Where its dtype differs from hidden's, and under autocast, rows are rounded
            as in ``linear_logprob``; they are multiplied and added up in float32 or wider.
        ids: (..., K) int64 or int32, K at least 1, in any order, repeated or not. An id outside
            [0, V), a negative one too, gives NaN, and what arrives there of an upstream gradient
            goes nowhere.
        bias: (V,), or None.
        temperature: greater than 0; a number, or a tensor that broadcasts to ids' shape without
            its last dimension, as in ``linear_logprob``.
        logit_scale, softcap, lora, weight_context: as there.
        tp_group, vocab_range, reduce_hidden_grad: as there; ids are global and the same on every
            rank, and so are the logits, since each id has one owner.
        options: ``memory_budget`` bounds the gathered rows; see ScoringOptions.

    Returns:
        (..., K) float32 (float64 for float64 products).

    Gradients cost one gather more for hidden, and for the weight a sort of the ids and K rows for
    each hidden state, which add up in float32 or wider and in the same order in every run.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        RuntimeError: on a second derivative.
        torch.OutOfMemoryError: where one gathered row does not fit.
    """
    head: dict[str, Any] = {
        "bias": bias,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "lora": lora,
        "tp_group": tp_group,
        "vocab_range": vocab_range,
        "weight_context": weight_context,
        "reduce_hidden_grad": reduce_hidden_grad,
    }
    with refused_together(tp_group), opened(weight_context, weight, bias):
        hidden, weight, head = local_parts(hidden, weight, head)
        check_ids(ids, hidden, "ids")
        by_row = temperature if isinstance(temperature, Tensor) else None
        number = 1.0 if isinstance(temperature, Tensor) else temperature
        model = make_model(hidden, weight, ids[..., 0], temperature=number, **head)
        request = make_request([model], ignore_index=_NONE_IGNORED, options=options)
        own = None
        if by_row is not None:
            own = check_temperature(by_row, ids[..., 0], "ids without its last dimension")
        return chosen_logits(request, model, ids, None, own)


def chosen_logits(
    request: Request,
    model: Model,
    ids: Tensor,
    target: Tensor | None,
    temperature: Tensor | None = None,
) -> Tensor:
    """As ``linear_logits``, of checked arguments, and 0 where ``target`` (...) is the request's
    ``ignore_index``: such rows of hidden are not read. None: all positions are scored.
    ``temperature`` (...), where positions have their own, divides what the model's map gives."""
    factor = None
    if temperature is not None:
        scored = None if target is None else target != request.ignore_index
        factor = factor_of(temperature, scored, statistics_dtype(request.dtype))
    # A copy: backward reads them again, and a batch's ids may be overwritten until then.
    ids = ids.to(torch.int64, copy=True)
    if torch.compiler.is_compiling():
        logits = operators.run(request, model, ids, target)
    else:
        logits = autograd.run(plan_chosen(request, model, target), model, ids)
    return logits if factor is None else logits * factor[..., None]
