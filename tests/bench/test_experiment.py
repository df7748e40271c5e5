# SPDX-License-Identifier: Apache-2.0
"""A step by mode, its error, and the products it is set against."""

from __future__ import annotations

import pytest
import torch

from fastpref.bench.experiment import (
    MODES,
    Case,
    Errors,
    Outcome,
    bare_products,
    errors,
    missing,
    step,
)
from fastpref.bench.work import Shape

SHAPE = Shape(4, 16, 8, 50)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_takes_the_gradients_of_its_mode(mode: str) -> None:
    case = Case("score", mode, "float64", SHAPE)  # type: ignore[arg-type]
    work = case.work()
    seen = []

    def loss(work: object, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), hidden.requires_grad, weight.requires_grad))
        return (hidden.sum() * weight.sum()).square()

    outcome = step(loss, work, case.mode)
    assert seen == [(mode != "forward", mode != "forward", mode == "trainable head")]
    assert len(outcome.gradients) == MODES[case.mode] - 1
    assert not outcome.loss.requires_grad
    shapes = [one.shape for one in outcome.gradients]
    assert shapes == [work.hidden.shape, work.weight.shape][: len(shapes)]


def outcome(loss: float, *gradients: float) -> Outcome:
    return Outcome(
        torch.tensor(loss, dtype=torch.float64),
        tuple(torch.full((4,), one, dtype=torch.float64) for one in gradients),
    )


@pytest.mark.parametrize(
    "found, exact, expected",
    [
        (outcome(1.0, 2.0, 1.25), outcome(1.0, 2.0, 1.0), Errors(0.0, 0.25)),
        (outcome(1.0, 1.0, 1.0), outcome(1.0, 2.0, 1.0), Errors(0.0, 0.5)),
        (outcome(11.0), outcome(10.0), Errors(0.1, 0.0)),
        # A loss near 0 is often a sum that cancels.
        (outcome(0.01), outcome(0.0), Errors(0.01, 0.0)),
        (outcome(3.0, 1.0), outcome(2.0, 1.0), Errors(0.5, 0.0)),
    ],
)
def test_errors(found: Outcome, exact: Outcome, expected: Errors) -> None:
    assert tuple(errors(found, exact)) == pytest.approx(tuple(expected))
    assert errors(found, exact).largest == pytest.approx(max(expected))


def test_an_error_of_nan_stays_one() -> None:
    for found in (outcome(1.0, float("nan"), 1.0), outcome(1.0, 1.0, float("nan"))):
        assert not errors(found, outcome(1.0, 1.0, 1.0)).gradient <= 1
    loss = errors(outcome(float("nan"), 1.0), outcome(1.0, 1.0))
    assert not loss.loss <= 1 and not loss.largest <= 1
    assert not Errors(0.0, float("nan")).largest <= 1


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("mode, products", MODES.items())
def test_bare_products_are_those_of_the_scored_rows(
    mode: str, products: int, models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Case("score", "forward", shape=SHAPE).work()
    flops: list[int] = []
    product = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        flops.append(a.shape[0] * a.shape[1] * b.shape[1])
        return product(a, b)

    monkeypatch.setattr(torch, "mm", counted)
    run = bare_products(work, mode, models)  # type: ignore[arg-type]
    assert flops == []
    run()
    assert flops == [32 * 8 * 50] * (products + models - 1)


def test_what_is_missing_is_named() -> None:
    assert missing("torch") is None
    assert missing("not_a_module") == "not_a_module is not installed"
