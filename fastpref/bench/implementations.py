# SPDX-License-Identifier: Apache-2.0
"""The implementations that are compared, each called the way its own users call it.

Each gets the work, hidden (B, T, H) and weight (V, H), and returns a loss: here DPO with a given
reference on the scores of one model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ScoringOptions, linear_logprob
from ..scoring.backends import unavailable_reason
from .work import IGNORE, Work

Loss = Callable[[Work, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    name: str
    loss: Loss
    unavailable: str | None = None  # the reason


def _fastpref(options: ScoringOptions | None = None) -> Loss:
    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        scores = linear_logprob(hidden, weight, work.target, options=options)
        if scores.logp is None:
            raise RuntimeError("logp was asked for")
        return work.dpo(scores.logp)

    return loss


def plain_logp(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits at every position, log-softmax in float32 or better, gather."""
    logits = hidden @ weight.t()
    exact = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.to(exact).log_softmax(-1).gather(-1, work.target.clamp(min=0)[..., None])
    return torch.where(work.scored, logp[..., 0], 0.0)


def _plain(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return work.dpo(plain_logp(work, hidden, weight))


def _linear_cross_entropy(chunked: bool) -> Loss:
    """Of the scored rows. Without chunks it holds their logits, in the input dtype."""

    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        options = None
        if chunked:
            # The defaults cut chunks so small that they take 3 to 22 times the bare products.
            options = torch.nn.LinearCrossEntropyOptions(
                batch_chunk_size=512, acc_policy="balanced"
            )
        nll = F.linear_cross_entropy(
            hidden[work.scored], weight, work.target[work.scored], reduction="none", options=options
        )
        logp = torch.zeros(work.target.shape, dtype=torch.float32, device=nll.device)
        return work.dpo(logp.masked_scatter(work.scored, -nll.float()))

    return loss


def trl_logp(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    """On CPU TRL scores every position, with masked targets set to 0."""
    from trl.kernels import ChunkedLogProbFunction

    logp, *_ = ChunkedLogProbFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        None,
        work.target.clamp(min=0).reshape(-1),
        1.0,
        32768,
        None,
        1.0,
        ("log_probs",),
    )
    masked: Tensor = logp.view(work.target.shape).masked_fill(~work.scored, 0)
    return masked


def _trl(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return work.dpo(trl_logp(work, hidden, weight))


def _liger(compiled: bool) -> Loss:
    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        module = LigerFusedLinearDPOLoss(
            ignore_index=IGNORE, beta=0.1, use_ref_model=False, compiled=compiled
        )
        value: Tensor = module(weight, hidden, work.target)[0]
        return value

    return loss


def missing(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def implementations() -> list[Implementation]:
    no_lce = None
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        no_lce = f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    return [
        Implementation("fastpref", _fastpref()),
        Implementation(
            "fastpref, torch backend",
            _fastpref(ScoringOptions(backend="torch")),
            unavailable_reason("torch", "cpu"),
        ),
        Implementation("plain torch", _plain),
        Implementation("F.linear_cross_entropy", _linear_cross_entropy(chunked=False), no_lce),
        Implementation(
            "F.linear_cross_entropy, chunks", _linear_cross_entropy(chunked=True), no_lce
        ),
        Implementation("TRL fused head", _trl, missing("trl")),
        Implementation("Liger DPO", _liger(compiled=True), missing("liger_kernel")),
    ]


def bare_products(work: Work, trainable: bool) -> None:
    """The matrix products of the scored tokens alone, into fresh outputs: the limit."""
    rows = work.hidden[work.scored]
    logits = torch.mm(rows, work.weight.t())
    torch.mm(logits, work.weight)
    if trainable:
        torch.mm(logits.t(), rows)
