# SPDX-License-Identifier: Apache-2.0
"""Ways to the log-probability of each token (B, T), 0 where not scored, each called the way its own
users call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ScoringOptions, linear_logprob
from ..scoring.backends import unavailable_reason
from ..scoring.types import Schedule
from . import trl_head
from .experiment import Case, missing
from .work import Work

# Log-probabilities from the work, hidden states (B, T, H) and a weight (V, H).
Logp = Callable[[Work, Tensor, Tensor], Tensor]


class Scorer(NamedTuple):
    name: str
    logp: Logp
    unavailable: str | None = None  # the reason
    compiles: bool = False


def peers(device: str) -> list[Scorer]:
    no_lce, no_cce = no_linear_cross_entropy(), no_cut_cross_entropy(device)
    return [
        Scorer("plain torch", plain),
        Scorer("torch.compile", compiled, compiles=True),
        Scorer("F.linear_cross_entropy", linear_cross_entropy(chunked=False), no_lce),
        Scorer("F.linear_cross_entropy, chunks", linear_cross_entropy(chunked=True), no_lce),
        Scorer("TRL fused head", trl, trl_head.unavailable()),
        Scorer("Cut Cross-Entropy", cut_cross_entropy, no_cce),
    ]


def no_linear_cross_entropy() -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked F.linear_cross_entropy"


def no_cut_cross_entropy(device: str) -> str | None:
    return "needs CUDA" if device == "cpu" else missing("cut_cross_entropy")


def why_not(backend: str, device: str) -> str | None:
    """Why ``backend`` cannot serve ``device``, or None; also where finding out fails."""
    try:
        return unavailable_reason(backend, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Own(NamedTuple):
    """fastpref, told how."""

    name: str
    options: ScoringOptions
    unavailable: str | None = None


def own(case: Case, schedules: tuple[Schedule, ...] = ()) -> list[Own]:
    """As it chooses by itself, by backend, and by ``schedules`` where both hidden states and weight
    need a gradient."""
    # Whoever pads a batch knows how many tokens it scores; a GPU would have to be asked.
    plain = ScoringOptions(max_scored=None if case.device == "cpu" else case.shape.scored)
    backends = ("torch",) if case.device == "cpu" else ("rows", "triton", "cuda", "torch")
    found = [Own("fastpref", plain)]
    for backend in backends:
        reason = why_not(backend, case.device)
        told = plain if reason else replace(plain, backend=cast(Any, backend))
        found.append(Own(f"fastpref, {backend} backend", told, reason))
    if case.mode == "trainable head":
        for one in schedules:
            # Batches are of whole groups, so the bound on all tokens does not serve.
            bound = None if one == "batches" else plain.max_scored
            found.append(Own(f"fastpref, {one}", replace(plain, schedule=one, max_scored=bound)))
    return found


def fastpref(options: ScoringOptions) -> Logp:
    def logp(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        scores = linear_logprob(hidden, weight, work.target, options=options)
        if scores.logp is None:
            raise RuntimeError("logp was asked for")
        return scores.logp

    return logp


def _plain(hidden: Tensor, weight: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Logits at every position, log-softmax in float32 or better, gather."""
    logits = hidden @ weight.t()
    exact = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.to(exact).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])
    return torch.where(scored, logp[..., 0], 0.0)


def plain(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return _plain(hidden, weight, work.target, work.scored)


@functools.cache
def _compiled_plain() -> Callable[..., Tensor]:
    return torch.compile(_plain, dynamic=False)


def compiled(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    return _compiled_plain()(hidden, weight, work.target, work.scored)


def linear_cross_entropy_options() -> Any:
    # The defaults cut chunks so small that they take 3 to 22 times the bare products.
    return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy="balanced")


def linear_cross_entropy(chunked: bool) -> Logp:
    """Of the scored rows. Without chunks it holds their logits, in the input dtype."""

    def logp(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        options = linear_cross_entropy_options() if chunked else None
        target = work.target.flatten()[work.positions]
        nll = F.linear_cross_entropy(
            work.rows(hidden), weight, target, reduction="none", options=options
        )
        return _spread(work, -nll.float())

    return logp


def _spread(work: Work, logp: Tensor) -> Tensor:
    """(N,) of the scored tokens to (B, T)."""
    found = logp.new_zeros(work.target.numel()).index_put((work.positions,), logp)
    return found.view(work.target.shape)


def trl(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    """TRL scores the scored tokens on a GPU; on a CPU every position, masked targets set to 0."""
    rows, target = hidden.flatten(0, 1), work.target.clamp(min=0).flatten()
    if hidden.is_cuda:
        rows, target = rows[work.positions], target[work.positions]
    settings = (1.0, 32768, None, 1.0, ("log_probs",))
    logp, *_ = trl_head.function().apply(rows, weight, None, target, *settings)
    if hidden.is_cuda:
        return _spread(work, logp)
    masked: Tensor = logp.view(work.target.shape).masked_fill(~work.scored, 0)
    return masked


def cut_cross_entropy(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    nll: Tensor = linear_cross_entropy(hidden, weight, work.target, reduction="none")
    return -nll.float()
