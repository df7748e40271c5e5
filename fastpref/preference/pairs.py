# SPDX-License-Identifier: Apache-2.0
"""The result of padded pairs of the DPO family on the CPU: one operator takes the log-probs of
their tokens to the loss, its slopes, rewards and metrics.

What result.py does step by step, for any objective, layout and device, takes as long as the
products of a hundred rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._extension import fake_of, operators_serve
from ..objectives import Objective
from ..units import PreferenceOutput
from ..units.layouts import Arrangement, Halves, Interleaved
from ..units.output import output_of
from ..units.pair_head import METRICS, Link, link_of
from .arguments import Arguments


class PairCall(NamedTuple):
    """What the operator is told of a call, beside tensors."""

    arrangement: Halves | Interleaved
    divisor: float  # of the sum of the losses
    link: Link


def pair_call_of(
    given: Arguments, objective: Objective, arrangement: Arrangement
) -> PairCall | None:
    """None where the operator does not serve calls of this signature."""
    link, rows = link_of(objective), given.target.shape[0]
    if link is None or not isinstance(arrangement, Halves | Interleaved) or not rows:
        return None
    further = given.cu_seqlens, given.token_weights, given.seq_group
    if any(one is not None for one in further) or given.extras or given.reduction == "none":
        return None
    if isinstance(given.denominator, Tensor):
        return None
    divisor = given.denominator
    if divisor is None:
        divisor = rows / 2 if given.reduction == "mean" else 1.0
    return PairCall(arrangement, float(divisor), link)


def serves(logp: Tensor, target: Tensor, ref_logps: Tensor | None) -> bool:
    """Whether the operator reads these tensors as they lie."""
    if not (logp.is_cpu and logp.is_contiguous() and target.is_contiguous()):
        return False
    if ref_logps is not None and ref_logps.dtype != logp.dtype:
        return False
    return target.dtype == torch.int64 and operators_serve(logp, target, ref_logps)


def pair_output(
    pairs: PairCall, logp: Tensor, target: Tensor, ignore_index: int, ref_logps: Tensor | None
) -> PreferenceOutput:
    """Of (B, T) log-probs of the tokens ``target``, and the reference's sums, (B,)."""
    given = logp, target, ignore_index, ref_logps, pairs
    if logp.requires_grad and torch.is_grad_enabled():
        loss, losses, rewards, logps, means = _PairRows.apply(*given)  # type: ignore[no-untyped-call]
    else:
        loss, losses, rewards, logps, _, means = _settled(*given)
    metrics = dict(zip(METRICS, means.unbind()[1:], strict=True))  # the first is that of the losses
    return output_of(pairs.arrangement, loss, losses, rewards, logps, ref_logps, metrics)


def _settled(
    logp: Tensor, target: Tensor, ignore_index: int, ref_logps: Tensor | None, pairs: PairCall
) -> tuple[Tensor, ...]:
    arrangement, divisor, link = pairs
    found: tuple[Tensor, ...] = torch.ops.fastpref.pair_rows.default(
        logp,
        target,
        ignore_index,
        ref_logps,
        isinstance(arrangement, Interleaved),
        link.gap_per_token,
        divisor,
        *link.arguments,
    )
    return found


@fake_of("fastpref::pair_rows")
def _pair_rows(
    logp: Tensor, target: Tensor, ignore_index: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logp.new_empty(logp.shape[:1])
    pairs, means = logp.new_empty((logp.shape[0] // 2,)), logp.new_empty((1 + len(METRICS),))
    return logp.new_empty(()), pairs, rows, torch.empty_like(rows), torch.empty_like(rows), means


class _PairRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        target: Tensor,
        ignore_index: int,
        ref_logps: Tensor | None,
        pairs: PairCall,
    ) -> tuple[Tensor, ...]:
        loss, losses, rewards, logps, slopes, means = _settled(
            logp, target, ignore_index, ref_logps, pairs
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slopes)
        ctx.tokens = logp.shape[1]
        ctx.mark_non_differentiable(losses, rewards, means)
        return loss, losses, rewards, logps, means

    @staticmethod
    def backward(
        ctx: Any, d_loss: Tensor | None, _: None, __: None, d_logps: Tensor | None, *___: None
    ) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        d_rows = d_logps
        if d_loss is not None:
            d_rows = slopes * d_loss if d_logps is None else torch.addcmul(d_logps, slopes, d_loss)
        d_logp = None if d_rows is None else d_rows.unsqueeze(1).expand(-1, ctx.tokens)
        return d_logp, None, None, None, None
