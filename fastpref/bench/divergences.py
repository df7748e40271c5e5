# SPDX-License-Identifier: Apache-2.0
"""A student's divergence from its teacher: the mean forward KL of the scored tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ScoringOptions, linear_divergence
from ..scoring.backends.divergences import unavailable_reason as divergence_unavailable
from . import exact, scorers
from .experiment import Case, Experiment, Implementation, Loss, bare_products, missing
from .work import Work


def divergence_experiment(case: Case) -> Experiment:
    work = case.work()
    answer = functools.cache(lambda: exact.of_divergence(work, case.mode))
    found = [
        *(
            Implementation(one.name, _fused(one.options), one.unavailable)
            for one in scorers.own(case, ("recompute",))
            if divergence_unavailable(one.options.backend) is None
        ),
        Implementation("plain torch", _plain),
        Implementation("torch.compile", _compiled, compiles=True),
        Implementation("Liger", _liger, missing("liger_kernel"), compiles=True),
    ]
    return Experiment(
        bare_products(work, case.mode, models=2),
        [one.candidate(work, case.mode, answer) for one in found],
        work.entropy,
    )


def _fused(options: ScoringOptions) -> Loss:
    def loss(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        value = linear_divergence(
            hidden, weight, work.ref_hidden, work.ref_weight, work.scored, options=options
        )
        return value.sum() / work.shape.scored

    return loss


def _rows(work: Work, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return work.rows(hidden), weight, work.rows(work.ref_hidden), work.ref_weight


def _mean_kl(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    models = student @ weight.t(), teacher @ teacher_weight.t()
    exact_dtype = torch.promote_types(student.dtype, torch.float32)
    log_q, log_p = (logits.to(exact_dtype).log_softmax(-1) for logits in models)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _plain(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return _mean_kl(*_rows(work, hidden, weight))


@functools.cache
def _compiled_mean_kl() -> Callable[..., Tensor]:
    return torch.compile(_mean_kl, dynamic=False)


def _compiled(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return _compiled_mean_kl()(*_rows(work, hidden, weight))


def _liger(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    rows = hidden.flatten(0, 1), weight, work.ref_hidden.flatten(0, 1), work.ref_weight
    # It marks dimensions of its arguments as dynamic, which other compiled functions then see.
    loss: Tensor = module(*(one.view_as(one) for one in (*rows, work.target.flatten())))
    return loss
