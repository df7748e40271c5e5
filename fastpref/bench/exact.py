# SPDX-License-Identifier: Apache-2.0
"""The same work in float64, a block of scored rows at a time, so that heads of any size fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .experiment import Mode, Outcome
from .work import ROWS_OF_A_BLOCK, Work


def of_scores(
    work: Work, mode: Mode, loss: Callable[[Tensor, Tensor | None], Tensor], reference: bool
) -> Outcome:
    """Of a loss of the log-probabilities (B, T), 0 where not scored, of the policy and of the
    reference if there is one."""
    hidden, weight = _exact_leaves(work, mode)
    with torch.no_grad():
        logp = scores(work, hidden, weight)
        ref = None
        if reference:
            ref = scores(work, work.ref_hidden.double(), work.ref_weight.double())
    logp.requires_grad_(mode != "forward")
    value = loss(logp, ref)
    if mode == "forward":
        return Outcome(value)
    (upstream,) = torch.autograd.grad(value, logp)
    # The loss is known; the gradient of each block's rows no longer needs the others.
    for rows in _blocks(work):
        (_logp(work, hidden, weight, rows) * upstream[rows]).sum().backward()
    return _outcome(value, hidden, weight)


def of_divergence(work: Work, mode: Mode) -> Outcome:
    """Of the mean forward KL of the scored tokens, from the reference as the teacher."""
    hidden, weight = _exact_leaves(work, mode)
    teacher = work.ref_weight.double()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    with torch.set_grad_enabled(mode != "forward"):
        for rows in _blocks(work):
            log_q = (hidden[rows] @ weight.t()).log_softmax(-1)
            log_p = (work.ref_hidden[rows].double() @ teacher.t()).log_softmax(-1)
            value = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / work.shape.scored
            if mode != "forward":
                value.backward()
            total += value.detach()
    return _outcome(total, hidden, weight)


def _exact_leaves(work: Work, mode: Mode) -> tuple[Tensor, Tensor]:
    hidden, weight = work.hidden.double(), work.weight.double()
    return hidden.requires_grad_(mode != "forward"), weight.requires_grad_(mode == "trainable head")


def _blocks(work: Work) -> Iterator[tuple[Tensor, ...]]:
    """Sequence and position of the scored tokens of each block."""
    for block in work.scored.nonzero().split(ROWS_OF_A_BLOCK):
        yield block.unbind(1)


def _logp(work: Work, hidden: Tensor, weight: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    logits = hidden[rows] @ weight.t()
    return logits.log_softmax(-1).gather(-1, work.target[rows][:, None])[:, 0]


def scores(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    logp = hidden.new_zeros(work.target.shape)
    for rows in _blocks(work):
        logp[rows] = _logp(work, hidden, weight, rows)
    return logp


def _outcome(value: Tensor, hidden: Tensor, weight: Tensor) -> Outcome:
    gradients = tuple(one.grad for one in (hidden, weight) if one.grad is not None)
    return Outcome(value.detach(), gradients)
