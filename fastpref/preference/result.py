# SPDX-License-Identifier: Apache-2.0
"""What becomes of a call's scores: the numbers of each row, further extras, the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.sequence_parts import whole_rows
from ..scoring import TokenScores
from ..scoring.autograd import Outputs
from ..scoring.rules.compared import WithDivergence, WithMixture
from ..units import Numbers, PreferenceOutput, TokenNumbers, unit_loss
from ..units.filling import to_be_filled
from .metrics import further_metrics
from .pairs import pair_output, serves
from .task import ENTROPY, KL, MARGINS, WEIGHTS, Task


class _Scored(NamedTuple):
    """What scoring leaves of the tokens."""

    policy: TokenScores
    reference: TokenScores | None
    both: Mapping[str, Tensor | None]  # what is made of both models side by side, by name


def result_of(
    task: Task, outputs: Outputs, reference: Outputs | None, loss: Tensor | None = None
) -> PreferenceOutput:
    """Of what the main pass and the one before it gave; ``loss`` in place of the one computed from
    them."""
    scored = _scored(task, outputs, reference)
    policy, ref_scores, _ = scored
    given, logp, ref_sums = task.given, _present(policy.logp), task.given.ref_logps
    if ref_sums is not None:
        ref_sums = ref_sums.detach()
        if not given.are_sums(task.batch):
            ref_scores = TokenScores(logp=ref_sums)
    if ref_scores is not None:
        ref_sums = task.batch.weighted_sums(_present(ref_scores.logp))
    target = given.target
    if task.pairs is not None and serves(logp, target, ref_sums):
        output = pair_output(task.pairs, logp, target, given.ignore_index, ref_sums)
    else:
        output = _unit_output(task, scored._replace(reference=ref_scores), ref_sums)
    metrics = further_metrics(given.outputs, policy, task.batch, task.arrangement)
    if loss is None and not metrics:
        return output
    return output._replace(
        loss=output.loss if loss is None else loss, metrics=output.metrics | metrics
    )


def _unit_output(task: Task, scored: _Scored, ref_sums: Tensor | None) -> PreferenceOutput:
    given, logp, ref_scores = task.given, _present(scored.policy.logp), scored.reference
    tokens, extras = None, task.extras
    if task.objective.unit == "token":
        ref_logp = None if ref_scores is None else ref_scores.logp
        tokens = TokenNumbers(logp, ref_logp, task.batch.scored)
        if given.seq_group is not None:
            tokens, extras = _of_whole_rows(task, tokens, given.seq_group)
    numbers = Numbers(
        logps=task.batch.sums_of_scores(logp),
        ref_logps=ref_sums,
        lengths=task.batch.lengths,
        tokens=tokens,
        makers=_of_distributions(task, scored),
    )
    return unit_loss(
        task.objective,
        numbers,
        task.arrangement,
        extras=extras,
        reduction=given.reduction,
        denominator=given.denominator,
    )


def _of_whole_rows(
    task: Task, tokens: TokenNumbers, group: dist.ProcessGroup
) -> tuple[TokenNumbers, Mapping[str, Tensor]]:
    """``tokens`` of all ranks, and the extras with those that are one a token of all ranks."""
    own = {name: one for name, one in tokens._asdict().items() if one is not None}
    given = [task.extras[name] for name in task.extras_of_tokens]
    whole = whole_rows([*own.values(), *given], group)
    found, extras = whole[: len(own)], whole[len(own) :]
    return (
        tokens._replace(**dict(zip(own, found, strict=True))),
        {**task.extras, **dict(zip(task.extras_of_tokens, extras, strict=True))},
    )


def _scored(task: Task, outputs: Outputs, reference: Outputs | None) -> _Scored:
    rule = task.main.rule
    if isinstance(rule, WithDivergence | WithMixture):
        return _Scored(*rule.parts(outputs))
    ref_scores = None if reference is None else TokenScores._make(reference)
    return _Scored(TokenScores._make(outputs), ref_scores, {})


def _of_distributions(
    task: Task, scored: _Scored
) -> dict[tuple[str, ...], Callable[[], tuple[Tensor, ...]]]:
    """The extras that are made of whole distributions over the vocabulary: of statistics that
    scoring leaves beside a token's log-prob, or of both models side by side."""
    return {
        WEIGHTS: lambda: _weights(task, scored.policy),
        ENTROPY: lambda: _ref_entropy(task, scored.reference),
        KL: lambda: _kl(task, scored.both),
        MARGINS: lambda: _margins(task, scored.both),
    }


def _weights(task: Task, policy: TokenScores) -> tuple[Tensor, ...]:
    """Likelihood of a token over that of its distribution's own, geometric mean over the row."""
    relative = _present(policy.logp).detach() - _present(policy.log_sum_sq_probs)
    return task.arrangement.split(task.batch.means(relative).exp())


def _ref_entropy(task: Task, reference: TokenScores | None) -> tuple[Tensor]:
    """Mean entropy of the reference over both responses, a share of log V."""
    if reference is None or reference.entropy is None:
        raise ValueError(
            "ref_entropy is filled in from the hidden states of the reference: pass ref_hidden, or "
            "extras={'ref_entropy': ...}"
        )
    split = task.arrangement.split
    chosen, rejected = split(task.batch.sums(reference.entropy))
    chosen_tokens, rejected_tokens = split(task.batch.counts())
    tokens = (chosen_tokens + rejected_tokens).clamp(min=1)
    share = (chosen + rejected) / tokens / math.log(task.vocabulary_size)
    edge = torch.finfo(share.dtype).eps
    return (share.clamp(edge, 1 - edge),)


def _kl(task: Task, both: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
    """Sums of KL(reference, policy) over each row's tokens."""
    return task.arrangement.split(task.batch.weighted_sums(_made("kl", task, both)))


def _margins(task: Task, both: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
    """Gaps of the log-probs under mixed logits."""
    mixed = [_made(name, task, both) for name in ("plus", "minus")]
    sums = [task.batch.weighted_sums(one) for one in mixed]
    sides = [task.arrangement.split(one) for one in sums]
    return tuple(chosen - rejected for chosen, rejected in sides)


def _made(name: str, task: Task, both: Mapping[str, Tensor | None]) -> Tensor:
    found = both.get(name)
    if found is None:
        names = [name for name in to_be_filled(task.objective) if name in (*KL, *MARGINS)]
        raise ValueError(
            f"{task.objective.name} compares whole distributions: pass the reference's "
            f"ref_hidden, or extras={{{', '.join(f'{name!r}: ...' for name in names)}}}"
        )
    return found


def _present(scores: Tensor | None) -> Tensor:
    if scores is None:
        raise RuntimeError("a score is used that was not asked for")
    return scores
