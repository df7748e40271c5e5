# SPDX-License-Identifier: Apache-2.0
"""Every implementation that is installed does the same work."""

from __future__ import annotations

import pytest
import torch

from fastpref.bench.implementations import Implementation
from fastpref.bench.suites import SUITES
from fastpref.bench.work import Shape, make_work
from fastpref.cli.bench import _error, _plain, _step

WORK = make_work(Shape(4, 16, 32, 300), torch.float32)
EVERY = [(what, one) for what, suite in SUITES.items() for one in suite.implementations()]


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("what, one", EVERY, ids=lambda one: getattr(one, "name", one))
def test_gradients_agree_with_float64(what: str, one: Implementation, trainable: bool) -> None:
    if one.unavailable is not None:
        pytest.skip(one.unavailable)
    if one.name.startswith("Liger"):
        pytest.skip("compiles for most of a minute; the benchmark itself checks it")
    exact = _step(_plain(SUITES[what]), WORK.to(torch.float64), trainable)
    got = _step(one, WORK, trainable)
    assert len(got) == 1 + trainable
    assert _error(got, exact) < 1e-5


def test_error_is_relative_and_the_worst() -> None:
    want = [torch.full((4,), 2.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    got = [torch.full((4,), 2.0), torch.full((4,), 1.25)]
    assert _error(got, want) == pytest.approx(0.25)


def test_bare_products_are_those_of_the_scored_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = []
    product = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        flops.append(a.shape[0] * a.shape[1] * b.shape[1])
        return product(a, b)

    monkeypatch.setattr(torch, "mm", counted)
    for suite, number in (("score", 3), ("dpo", 4), ("simpo", 3), ("divergence", 4)):
        for trainable in (True, False):
            flops.clear()
            SUITES[suite].products(WORK, trainable)
            assert flops == [32 * 32 * 300] * (number - (not trainable))
