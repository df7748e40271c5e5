# SPDX-License-Identifier: Apache-2.0
"""What becomes of a call's scores: the numbers of each row, further extras, the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..scoring import TokenScores
from ..units import Numbers, PreferenceOutput, TokenNumbers, unit_loss
from ..units.filling import to_be_filled
from .comparison import Comparison
from .metrics import further_metrics
from .task import ENTROPY, KL, MARGINS, WEIGHTS, Task


def result_of(
    task: Task, policy: TokenScores, reference: TokenScores | None, loss: Tensor | None = None
) -> PreferenceOutput:
    """Of the scores of both; ``loss`` in place of the one computed from them."""
    given, logp, ref_sums = task.given, _present(policy.logp), task.given.ref_logps
    if ref_sums is not None:
        ref_sums = ref_sums.detach()
        if not given.are_sums(task.batch):
            reference = TokenScores(logp=ref_sums)
    if reference is not None:
        ref_sums = task.batch.sums(_present(reference.logp), given.token_weights)
    tokens = None
    if task.objective.unit == "token":
        ref_logp = None if reference is None else reference.logp
        tokens = TokenNumbers(logp, ref_logp, task.batch.scored)
    numbers = Numbers(
        logps=task.batch.sums(logp, given.token_weights),
        ref_logps=ref_sums,
        lengths=task.batch.lengths,
        tokens=tokens,
        makers=_of_distributions(task, policy, reference),
    )
    output = unit_loss(
        task.objective,
        numbers,
        task.arrangement,
        extras=task.extras,
        reduction=given.reduction,
        denominator=given.denominator,
    )
    metrics = further_metrics(given.outputs, policy, task.batch, task.arrangement)
    return output._replace(
        loss=output.loss if loss is None else loss, metrics=output.metrics | metrics
    )


def _of_distributions(
    task: Task, policy: TokenScores, reference: TokenScores | None
) -> dict[tuple[str, ...], Callable[[], tuple[Tensor, ...]]]:
    """The extras that are made of whole distributions over the vocabulary: of statistics that
    scoring leaves beside a token's log-prob, or of both models side by side."""
    return {
        WEIGHTS: lambda: _weights(task, policy),
        ENTROPY: lambda: _ref_entropy(task, reference),
        KL: lambda: _kl(task),
        MARGINS: lambda: _margins(task),
    }


def _weights(task: Task, policy: TokenScores) -> tuple[Tensor, ...]:
    """Likelihood of a token over that of its distribution's own, geometric mean over the row."""
    relative = _present(policy.logp).detach() - _present(policy.log_sum_sq_probs)
    return task.arrangement.split(task.batch.means(relative).exp())


def _ref_entropy(task: Task, reference: TokenScores | None) -> tuple[Tensor]:
    """Mean entropy of the reference over both responses, a share of log V."""
    if task.reference is None or reference is None:
        raise ValueError(
            "ref_entropy is filled in from the hidden states of the reference: pass ref_hidden, or "
            "extras={'ref_entropy': ...}"
        )
    split = task.arrangement.split
    chosen, rejected = split(task.batch.sums(_present(reference.entropy)))
    chosen_lengths, rejected_lengths = split(task.batch.lengths())
    tokens = (chosen_lengths + rejected_lengths).clamp(min=1)
    share = (chosen + rejected) / tokens / math.log(task.reference.vocabulary_size)
    edge = torch.finfo(share.dtype).eps
    return (share.clamp(edge, 1 - edge),)


def _kl(task: Task) -> tuple[Tensor, ...]:
    """Sums of KL(reference, policy) over each row's tokens."""
    sums = task.batch.sums(_compared(task).kl(), task.given.token_weights)
    return task.arrangement.split(sums)


def _margins(task: Task) -> tuple[Tensor, ...]:
    """Gaps of the log-probs under mixed logits."""
    mixed = _compared(task).mixed_logp(task.objective.hyperparameters["epsilon"])
    sums = [task.batch.sums(one, task.given.token_weights) for one in mixed]
    sides = [task.arrangement.split(one) for one in sums]
    return tuple(chosen - rejected for chosen, rejected in sides)


def _compared(task: Task) -> Comparison:
    if task.reference is None:
        names = to_be_filled(task.objective, {}, (*KL, *MARGINS))
        raise ValueError(
            f"{task.objective.name} compares whole distributions: pass the reference's "
            f"ref_hidden, or extras={{{', '.join(f'{name!r}: ...' for name in names)}}}"
        )
    return Comparison(task.policy, task.reference, task.batch.target, task.batch.ignore_index)


def _present(scores: Tensor | None) -> Tensor:
    if scores is None:
        raise RuntimeError("a score is used that was not asked for")
    return scores
