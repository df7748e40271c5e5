# SPDX-License-Identifier: Apache-2.0
"""What lies between token log-probabilities and the loss: the sums of sequences and an objective,
forward and backward, set against the matrix products of a step. It runs in float32 beside products
of any dtype; the check against float64 is of its rounding, tests/objectives are of its formula.

On CUDA each is captured once and replayed: one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import objectives, sequence_logp
from ..objectives import Objective
from .experiment import Candidate, Case, Experiment, Mode, Outcome, bare_products
from .work import Work

# Of the objectives that have no default for them.
REQUIRED: dict[str, dict[str, Any]] = {
    "dpo_shift": {"shift": 0.7},
    "dr_grpo": {"max_completion_length": 256},
}
# Required by default hyperparameters, though not by the signature.
USUAL = ("chosen_lengths", "rejected_lengths", "scores", "ref_token_logp")
RESPONSES = 4  # of a list or a group of sampled responses
EMBEDDING = 16


def heads_experiment(case: Case) -> Experiment:
    work = case.work()
    candidates = []
    for name in objectives.names():
        objective = objectives.get(name, **REQUIRED.get(name, {}))
        given = _Given(objective, work)
        run = functools.partial(head, objective, given, torch.float32, case.mode)
        if case.device != "cpu":
            run = functools.partial(_replayed, [], run)
        exact = functools.partial(head, objective, given, torch.float64, case.mode)
        candidates.append(Candidate(name, run, exact))
    return Experiment(bare_products(work, case.mode), candidates)


class _Given:
    """What an objective takes beside the policy's log-probabilities, in the sizes of the work."""

    def __init__(self, objective: Objective, work: Work) -> None:
        self.mask = work.scored
        self.generator = torch.Generator(self.mask.device).manual_seed(0)
        self.policy, self.reference, self.old = (-3 * self._draw(*self.mask.shape) for _ in "123")
        rows, lengths, device = len(self.mask), self.mask.sum(-1), self.mask.device
        places = torch.arange(rows, dtype=torch.int64, device=device)
        self.lead = {
            "pair": (rows // 2,),
            "unit": (rows,),
            "list": (rows // RESPONSES, RESPONSES),
            "token": (rows,),
        }[objective.unit]
        named = {
            "lengths": lengths.reshape(-1, *self.lead[1:]),
            "chosen_lengths": lengths[: rows // 2],
            "rejected_lengths": lengths[rows // 2 :],
            "labels": places % 2 == 0,
            "prompt_embeddings": self._draw(rows // 2, EMBEDDING),
            "group_ids": places // RESPONSES,
            "rewards": (places % 2).float(),
            "mask": self.mask,
            "ref_token_logp": self.reference,
            "running_mean": torch.full((), 0.5, device=device, dtype=torch.float32),
            "running_std": torch.full((), 0.5, device=device, dtype=torch.float32),
        }
        wanted = [
            name for name, facts in objective.extras.items() if facts.required or name in USUAL
        ]
        self.extras = {name: named.get(name, self._draw(*self.lead)) for name in wanted}

    def _draw(self, *sizes: int) -> Tensor:
        """Within (0, 1)."""
        device = self.generator.device
        return 0.05 + 0.9 * torch.rand(
            *sizes, generator=self.generator, device=device, dtype=torch.float32
        )


def head(objective: Objective, given: _Given, dtype: torch.dtype, mode: Mode) -> Outcome:
    logp = given.policy.detach().to(dtype).requires_grad_(mode != "forward")
    extras: dict[str, Any] = {
        name: one.to(dtype) if one.is_floating_point() else one
        for name, one in given.extras.items()
    }
    with torch.set_grad_enabled(mode != "forward"):
        if objective.unit == "token":
            losses = objective(logp, given.old.to(dtype), **extras).losses
        else:
            losses = objective(*_sums(objective, given, logp, dtype), **extras).losses
        loss = losses.mean()
    if mode == "forward":
        return Outcome(loss)
    (gradient,) = torch.autograd.grad(loss, logp)
    return Outcome(loss.detach(), (gradient,))


def _sums(objective: Objective, given: _Given, logp: Tensor, dtype: torch.dtype) -> list[Tensor]:
    tokens = [logp, *([given.reference.to(dtype)] if objective.needs_reference else [])]
    sums = [sequence_logp(one, mask=given.mask) for one in tokens]
    if objective.unit == "pair":
        return [half for one in sums for half in one.chunk(2)]
    return [one.view(given.lead) for one in sums]


def _replayed(captured: list[Callable[[], Outcome]], run: Callable[[], Outcome]) -> Outcome:
    """The outcome of a graph, captured the first time and kept in ``captured``."""
    if not captured:
        captured.append(_capture(run))
    return captured[0]()


def _capture(run: Callable[[], Outcome]) -> Callable[[], Outcome]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = run()

    def replay() -> Outcome:
        graph.replay()
        return outcome

    return replay
