# SPDX-License-Identifier: Apache-2.0
"""Implementations of a student's divergence from its teacher: the mean forward KL of the scored
tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import linear_divergence
from .implementations import Implementation, missing
from .work import Work


def divergence_implementations() -> list[Implementation]:
    return [
        Implementation("fastpref", _fused),
        Implementation("plain torch", _plain),
        Implementation("Liger JSD", _liger, missing("liger_kernel")),
    ]


def _fused(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    value = linear_divergence(hidden, weight, work.ref_hidden, work.ref_weight, work.scored)
    return value.sum() / work.scored.sum()


def _plain(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    rows = work.scored
    student, teacher = hidden[rows] @ weight.t(), work.ref_hidden[rows] @ work.ref_weight.t()
    exact = torch.promote_types(student.dtype, torch.float32)
    log_q, log_p = (logits.to(exact).log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / rows.sum()


def _liger(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
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
