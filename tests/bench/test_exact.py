# SPDX-License-Identifier: Apache-2.0
"""The answer taken block by block is that of the whole, in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastpref.bench import exact
from fastpref.bench.experiment import MODES, Case, errors, step
from fastpref.bench.work import Shape, Work


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "ROWS_OF_A_BLOCK", 5)


def case(mode: str) -> Case:
    return Case("score", mode, "float64", Shape(4, 16, 8, 50))  # type: ignore[arg-type]


def log_softmax(work: Work, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.t()).log_softmax(-1)


def logp(work: Work, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found = log_softmax(work, hidden, weight)
    chosen = found.gather(-1, work.target.clamp(min=0)[..., None])[..., 0]
    return torch.where(work.scored, chosen, 0.0)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_of_scores(mode: str, reference: bool) -> None:
    work = case(mode).work()

    def loss(policy: torch.Tensor, ref: torch.Tensor | None) -> torch.Tensor:
        assert (ref is not None) == reference
        apart = policy if ref is None else policy - ref
        return apart.sum(-1).square().mean()

    def whole(work: Work, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ref = logp(work, work.ref_hidden, work.ref_weight) if reference else None
        return loss(logp(work, hidden, weight), ref)

    found = exact.of_scores(work, case(mode).mode, loss, reference)
    assert len(found.gradients) == MODES[case(mode).mode] - 1
    assert errors(found, step(whole, work, case(mode).mode)).largest < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_of_divergence(mode: str) -> None:
    work = case(mode).work()

    def whole(work: Work, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        log_q = log_softmax(work, hidden, weight)
        log_p = log_softmax(work, work.ref_hidden, work.ref_weight)
        rows = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        return rows[work.scored].mean()

    found = exact.of_divergence(work, case(mode).mode)
    assert found.loss > 0.01
    assert errors(found, step(whole, work, case(mode).mode)).largest < 1e-12
