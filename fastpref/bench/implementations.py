# SPDX-License-Identifier: Apache-2.0
"""The implementations that are compared, each called the way its own users call it.

Each gets the work, hidden (B, T, H) and weight (V, H), and returns a loss: of one model's scores,
of policy and reference together, or of a student's divergence from its teacher.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ScoringOptions, linear_divergence, linear_logprob, objectives, preference_loss
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


def _plain_logp(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits at every position, log-softmax in float32 or better, gather."""
    logits = hidden @ weight.t()
    exact = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.to(exact).log_softmax(-1).gather(-1, work.target.clamp(min=0)[..., None])
    return torch.where(work.scored, logp[..., 0], 0.0)


def _plain(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return work.dpo(_plain_logp(work, hidden, weight))


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


def _trl(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
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
    return work.dpo(logp.view(work.target.shape).masked_fill(~work.scored, 0))


def _liger(compiled: bool) -> Loss:
    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        module = LigerFusedLinearDPOLoss(
            ignore_index=IGNORE, beta=0.1, use_ref_model=False, compiled=compiled
        )
        value: Tensor = module(weight, hidden, work.target)[0]
        return value

    return loss


def _preference_loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return preference_loss(
        hidden, weight, work.target, "dpo", ref_hidden=work.ref_hidden, ref_weight=work.ref_weight
    ).loss


def _plain_preference(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        reference = _plain_logp(work, work.ref_hidden, work.ref_weight).sum(-1).chunk(2)
    policy = _plain_logp(work, hidden, weight).sum(-1).chunk(2)
    return objectives.dpo(*policy, *reference).losses.mean()


def _liger_preference(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=0.1)
    found = module(
        weight, hidden, work.target, ref_input=work.ref_hidden, ref_weight=work.ref_weight
    )
    loss: Tensor = found[0]
    return loss


def _divergence(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    """Mean forward KL over the scored tokens."""
    value = linear_divergence(hidden, weight, work.ref_hidden, work.ref_weight, work.scored)
    return value.sum() / work.scored.sum()


def _plain_divergence(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    rows = work.scored
    log_q = (hidden[rows] @ weight.t()).float().log_softmax(-1)
    log_p = (work.ref_hidden[rows] @ work.ref_weight.t()).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / rows.sum()


def _liger_divergence(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    loss: Tensor = module(
        hidden.flatten(0, 1),
        weight,
        work.ref_hidden.flatten(0, 1),
        work.ref_weight,
        work.target.flatten(),
    )
    return loss


def _missing(module: str) -> str | None:
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
        Implementation("TRL fused head", _trl, _missing("trl")),
        Implementation("Liger DPO", _liger(compiled=True), _missing("liger_kernel")),
    ]


def preference_implementations() -> list[Implementation]:
    return [
        Implementation("fastpref", _preference_loss),
        Implementation("plain torch", _plain_preference),
        Implementation("Liger DPO", _liger_preference, _missing("liger_kernel")),
    ]


def divergence_implementations() -> list[Implementation]:
    return [
        Implementation("fastpref", _divergence),
        Implementation("plain torch", _plain_divergence),
        Implementation("Liger JSD", _liger_divergence, _missing("liger_kernel")),
    ]


def bare_products(work: Work, trainable: bool) -> None:
    """The matrix products of the scored tokens alone, into fresh outputs: the limit."""
    rows = work.hidden[work.scored]
    logits = torch.mm(rows, work.weight.t())
    torch.mm(logits, work.weight)
    if trainable:
        torch.mm(logits.t(), rows)


def two_model_products(work: Work, trainable: bool) -> None:
    """And that of the other model."""
    torch.mm(work.ref_hidden[work.scored], work.ref_weight.t())
    bare_products(work, trainable)


class Suite(NamedTuple):
    """Implementations of the same work, and its limit."""

    title: str
    implementations: Callable[[], list[Implementation]]
    products: Callable[[Work, bool], None]
    overflows: bool = False  # whether overflowing rows are measured too


SUITES = {
    "score": Suite("scores and DPO", implementations, bare_products, overflows=True),
    "preference": Suite(
        "preference_loss, live reference", preference_implementations, two_model_products
    ),
    "divergence": Suite(
        "linear_divergence, forward KL", divergence_implementations, two_model_products
    ),
}
