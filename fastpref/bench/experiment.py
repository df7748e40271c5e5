# SPDX-License-Identifier: Apache-2.0
"""What is measured, and what came of it before any clock ran."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .work import Logits, Shape, Work, make_work

Mode = Literal["forward", "frozen head", "trainable head"]
# And the matrix products each takes, in units of one: scores; and d hidden; and d weight.
MODES: dict[Mode, int] = {"forward": 1, "frozen head": 2, "trainable head": 3}


@dataclass(frozen=True)
class Case:
    what: str  # a suite
    mode: Mode
    dtype: str = "float32"
    shape: Shape = field(default_factory=Shape)
    logits: Logits = "trained"
    device: str = "cpu"

    def work(self, overflowing: float = 0.0) -> Work:
        dtype = getattr(torch, self.dtype)
        return make_work(self.shape, dtype, self.device, self.logits, overflowing)


class Outcome(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()  # a number a token each, as far as there are any


@dataclass(frozen=True)
class Candidate:
    name: str
    run: Callable[[], Outcome]
    exact: Callable[[], Outcome]  # in float64
    unavailable: str | None = None  # the reason
    compiles: bool = False  # for seconds, before its first run
    # What of its outcome ``exact`` knows.
    sampled: Callable[[Outcome], Outcome] = lambda outcome: outcome


@dataclass(frozen=True)
class Experiment:
    limit: Callable[[], object]  # the bare matrix products
    candidates: Sequence[Candidate]
    entropy: float | None = None  # of the work's softmax


# A loss from the work, its hidden states (B, T, H) and its weight (V, H).
Loss = Callable[[Work, Tensor, Tensor], Tensor]


class Implementation(NamedTuple):
    name: str
    loss: Loss
    unavailable: str | None = None
    compiles: bool = False

    def candidate(self, work: Work, mode: Mode, exact: Callable[[], Outcome]) -> Candidate:
        run = functools.partial(step, self.loss, work, mode)
        return Candidate(self.name, run, exact, self.unavailable, self.compiles)


def step(loss: Loss, work: Work, mode: Mode) -> Outcome:
    """The loss, and the gradients that ``mode`` asks for."""
    # Liger takes gradients in forward of whatever says that it needs one.
    hidden, weight = work.leaves(hidden=mode != "forward", weight=mode == "trainable head")
    if mode == "forward":
        with torch.no_grad():
            return Outcome(loss(work, hidden, weight))
    value = loss(work, hidden, weight)
    value.backward()
    gradients = (hidden.grad, weight.grad) if weight.requires_grad else (hidden.grad,)
    return Outcome(value.detach(), tuple(one for one in gradients if one is not None))


class Errors(NamedTuple):
    # Relative where it is over 1; of scores, of each kind, the root-mean-square one.
    loss: float
    gradient: float  # the largest relative root-mean-square error of a gradient; 0 without

    @property
    def largest(self) -> float:
        # Of numbers with NaN among them, Python's max may be any.
        return float(torch.tensor(self, dtype=torch.float32, device="cpu").max())


def errors(found: Outcome, exact: Outcome) -> Errors:
    pairs = zip(found.gradients, exact.gradients, strict=True)
    of_gradients = [float((got.double() - want).norm() / want.norm()) for got, want in pairs]
    values = [(found.loss, exact.loss), *zip(found.scores, exact.scores, strict=False)]
    of_loss = [
        ((got.double() - want) / want.abs().clamp(min=1)).square().mean().sqrt()
        for got, want in values
    ]
    return Errors(
        float(torch.stack(of_loss).max()),
        float(torch.tensor([0.0, *of_gradients], dtype=torch.float32, device="cpu").max()),
    )


def bare_products(work: Work, mode: Mode, models: int = 1) -> Callable[[], None]:
    """The matrix products of the scored tokens alone, into fresh outputs. Of a second model only
    the scores."""
    rows, ref_rows = work.rows(work.hidden), work.rows(work.ref_hidden)

    def products() -> None:
        if models == 2:
            torch.mm(ref_rows, work.ref_weight.t())
        logits = torch.mm(rows, work.weight.t())
        if MODES[mode] > 1:
            torch.mm(logits, work.weight)
        if MODES[mode] > 2:
            torch.mm(logits.t(), rows)

    return products


def missing(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"
