# SPDX-License-Identifier: Apache-2.0
"""The head alone on packed rows: the mean log-probability of the targets and its gradients, and the
call that TRL's trainers make of their head, with the statistics that they log."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import linear_logprob
from ..optim import WeightGradBasis, dct_matrix
from . import scorers, trl_head
from .exact_head import Sample, sample
from .experiment import Candidate, Case, Experiment, Mode, Outcome, bare_products, missing
from .lanes import Lane, lanes
from .work import Work

# What TRL's DPO asks for.
OUTPUTS = ("logp", "entropy", "mean_logits", "is_top1")
TRL_OUTPUTS = ("log_probs", *OUTPUTS[1:])
SCORES = 3  # of them that are compared: which token is first is a matter of rounding
TRL_CHUNK = 32768

# Minus the mean log-probability, and scores by token where there are any, of rows (N, H), a weight
# (V, H) and targets (N,).
Found = tuple[Tensor, tuple[Tensor, ...]]
Head = Callable[[Tensor, Tensor, Tensor], Found]


class Way(NamedTuple):
    name: str
    head: Head
    unavailable: str | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def head_experiment(case: Case) -> Experiment:
    """A mean of log-probabilities: what peers made for cross-entropy do as well."""
    ways = [_own(lane, ("logp",), case.device) for lane in lanes(case.device)]
    no_lce = scorers.no_linear_cross_entropy()
    ways += [
        Way("TRL fused head", _trl(TRL_OUTPUTS[:1]), trl_head.unavailable()),
        Way("Liger", _liger, _no_liger(case.device)),
        Way(
            "Cut Cross-Entropy",
            _cut_cross_entropy,
            scorers.no_cut_cross_entropy(case.device),
        ),
        Way("F.linear_cross_entropy", _linear_cross_entropy(chunked=False), no_lce),
        Way("F.linear_cross_entropy, chunks", _linear_cross_entropy(chunked=True), no_lce),
        Way("plain torch", _plain),
    ]
    return _experiment(case, ways)


def call_experiment(case: Case) -> Experiment:
    ways = [_own(lane, OUTPUTS, case.device) for lane in lanes(case.device)]
    ways.append(Way("TRL fused head", _trl(TRL_OUTPUTS), trl_head.unavailable()))
    return _experiment(case, ways)


def low_rank_experiment(case: Case) -> Experiment:
    """The gradient of the weight, and its projection on some columns of the DCT in its place."""
    packed = _packed_of(case)
    size = case.shape.hidden_size
    candidates = list(_experiment(case, [Way("dense", _dense)]).candidates)
    matrix = dct_matrix(size, device=case.device)
    for rank in (size // 32, size // 8):
        for transform in (None, matrix):
            columns = matrix[:, :rank]
            candidates.append(
                Candidate(
                    f"{rank} columns" + ("" if transform is None else ", choosing"),
                    functools.partial(_projected, packed, columns, transform),
                    functools.partial(_exact_projected, packed.answer, columns),
                    sampled=functools.partial(_picked, packed.answer),
                )
            )
    limit = bare_products(packed.work, case.mode)
    return Experiment(limit, candidates, packed.work.entropy)


def _dense(hidden: Tensor, weight: Tensor, target: Tensor) -> Found:
    logp = linear_logprob(hidden, weight, target).logp
    if logp is None:
        raise RuntimeError("logp was asked for")
    return -logp.mean(), (logp,)


def _projected(packed: _Packed, columns: Tensor, transform: Tensor | None) -> Outcome:
    hidden, weight = packed.hidden.detach().requires_grad_(), packed.work.weight.detach()
    exact: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    basis = WeightGradBasis(columns, torch.zeros((len(weight), columns.shape[1]), **exact))
    if transform is not None:
        norms = torch.zeros(transform.shape[1], **exact)
        basis = basis._replace(transform=transform, norms=norms)
    found = linear_logprob(hidden, weight, packed.target, weight_grad_basis=basis)
    if found.logp is None:
        raise RuntimeError("logp was asked for")
    loss = -found.logp.mean()
    loss.backward()
    gradients = (one for one in (hidden.grad, basis.out) if one is not None)
    return Outcome(loss.detach(), tuple(gradients), (found.logp.detach(),))


def _exact_projected(answer: Callable[[], Sample], columns: Tensor) -> Outcome:
    found = answer()
    return Outcome(found.loss, (found.d_hidden, found.d_weight @ columns.double()), found.scores)


def _packed_of(case: Case) -> _Packed:
    """Whatever the mode and the call."""
    return _packed(replace(case, mode="forward", what="head"))


def _experiment(case: Case, ways: list[Way]) -> Experiment:
    packed = _packed_of(case)
    exact = functools.partial(_exact, packed.answer, case.mode)
    pick = functools.partial(_picked, packed.answer)
    candidates = [
        Candidate(
            way.name,
            functools.partial(_step, way, packed, case.mode),
            exact,
            way.unavailable,
            sampled=pick,
        )
        for way in ways
    ]
    limit = bare_products(packed.work, case.mode)
    return Experiment(limit, candidates, packed.work.entropy)


class _Packed(NamedTuple):
    work: Work
    hidden: Tensor  # (N, H), the scored rows
    target: Tensor  # (N,)
    answer: Callable[[], Sample]


# The cases of one shape follow each other.
@functools.lru_cache(maxsize=1)
def _packed(case: Case) -> _Packed:
    work = case.work()
    # The reference model takes no part, and as much memory.
    work = replace(work, ref_hidden=work.hidden, ref_weight=work.weight)
    hidden, target = work.rows(work.hidden), work.target.flatten()[work.positions]
    answer = functools.cache(lambda: sample(hidden, work.weight, target))
    return _Packed(work, hidden, target, answer)


def _exact(answer: Callable[[], Sample], mode: Mode) -> Outcome:
    found = answer()
    gradients = {
        "forward": (),
        "frozen head": (found.d_hidden,),
        "trainable head": (found.d_hidden, found.d_weight),
    }
    return Outcome(found.loss, gradients[mode], found.scores)


def _picked(answer: Callable[[], Sample], outcome: Outcome) -> Outcome:
    known = answer()
    gradients = zip(outcome.gradients, (known.rows, known.columns), strict=False)
    return Outcome(
        outcome.loss,
        tuple(one[at] for one, at in gradients),
        tuple(one[known.rows] for one in outcome.scores[:SCORES]),
    )


def _step(way: Way, packed: _Packed, mode: Mode) -> Outcome:
    hidden = packed.hidden.detach().requires_grad_(mode != "forward")
    weight = packed.work.weight.detach().requires_grad_(mode == "trainable head")
    with torch.set_grad_enabled(mode != "forward"), way.around():
        loss, scores = way.head(hidden, weight, packed.target)
        if mode != "forward":
            loss.backward()
    gradients = (one.grad for one in (hidden, weight) if one.grad is not None)
    return Outcome(loss.detach(), tuple(gradients), tuple(one.detach() for one in scores))


def _own(lane: Lane, outputs: tuple[str, ...], device: str) -> Way:
    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> Found:
        found = linear_logprob(hidden, weight, target, outputs=outputs, options=lane.options())
        if found.logp is None:
            raise RuntimeError("logp was asked for")
        return -found.logp.mean(), tuple(one for one in found if one is not None)

    return Way(f"fastpref, {lane.name}", head, lane.unavailable(device), lane.tiles)


def _trl(outputs: tuple[str, ...]) -> Head:
    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> Found:
        settings = (1.0, TRL_CHUNK, None, 1.0, outputs)
        logp, entropy, _, mean_logits, is_top1 = trl_head.function().apply(
            hidden, weight, None, target, *settings
        )
        scores = (logp, entropy, mean_logits, is_top1)
        return -logp.mean(), tuple(one for one in scores if one is not None)

    return head


def _no_liger(device: str) -> str | None:
    return "needs CUDA" if device == "cpu" else missing("liger_kernel")


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Found:
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, target), ()


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Found:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    return linear_cross_entropy(hidden, weight, target), ()


def _linear_cross_entropy(chunked: bool) -> Head:
    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> Found:
        options = scorers.linear_cross_entropy_options() if chunked else None
        return F.linear_cross_entropy(hidden, weight, target, options=options), ()

    return head


def _plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Found:
    return F.cross_entropy((hidden @ weight.t()).float(), target), ()
