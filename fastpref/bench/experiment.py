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


@dataclass(frozen=True)
class Candidate:
    name: str
    run: Callable[[], Outcome]
    exact: Callable[[], Outcome]  # in float64
    unavailable: str | None = None  # the reason
    compiles: bool = False  # for seconds, before its first run


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
    hidden, weight = work.leaves(mode == "trainable head")
    if mode == "forward":
        with torch.no_grad():
            return Outcome(loss(work, hidden, weight))
    value = loss(work, hidden, weight)
    value.backward()
    gradients = (hidden.grad, weight.grad) if weight.requires_grad else (hidden.grad,)
    return Outcome(value.detach(), tuple(one for one in gradients if one is not None))


def error(found: Outcome, exact: Outcome) -> float:
    """The largest of the loss's error, relative where the loss is over 1, and of the gradients'
    relative root-mean-square errors."""
    pairs = zip(found.gradients, exact.gradients, strict=True)
    errors = [float((got.double() - want).norm() / want.norm()) for got, want in pairs]
    errors.append(float((found.loss.double() - exact.loss).abs() / exact.loss.abs().clamp(min=1)))
    # Of a list with NaN in it, Python's max may be anything.
    return float(torch.tensor(errors).max())


def bare_products(work: Work, mode: Mode, models: int = 1) -> None:
    """The matrix products of the scored tokens alone, into fresh outputs: the limit. Of a second
    model only the scores."""
    if models == 2:
        torch.mm(work.ref_hidden[work.scored], work.ref_weight.t())
    rows = work.hidden[work.scored]
    logits = torch.mm(rows, work.weight.t())
    if MODES[mode] > 1:
        torch.mm(logits, work.weight)
    if MODES[mode] > 2:
        torch.mm(logits.t(), rows)


def missing(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"
