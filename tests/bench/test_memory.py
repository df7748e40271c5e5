# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a step, measured in a process of its own, stays within its formula."""

from __future__ import annotations

import sys

import pytest

from fastpref.bench.experiment import Case
from fastpref.bench.memory import PROJECTED, RANK, measure, names
from fastpref.bench.work import Shape

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CASE = Case("score", "trainable head", "float32", Shape(8, 256, 64, 32000))
BUDGET = 16  # MiB


@pytest.mark.heavy
def test_recompute_stays_within_gradients_and_workspace() -> None:
    row = measure(CASE, "fastpref, recompute, 16 MiB", BUDGET)
    assert row["logits"] == 125.0 and row["scored"] == 1024
    assert row["hidden_size"] == 64 and row["vocab_size"] == 32000
    assert row["gradients"] == pytest.approx((2048 + 32000) * 64 * 4 / 2**20)
    assert row["workspace"] < 2 * BUDGET
    # A few MiB for the stacks and caches of libraries; a kept or doubled tile would show.
    assert row["peak"] < row["gradients"] + row["workspace"] + 8
    # What the warming call left behind must not hide what a call needs.
    assert row["peak"] > row["gradients"]


@pytest.mark.slow
@pytest.mark.heavy
def test_what_a_call_keeps_counts_though_it_was_kept_before() -> None:
    row = measure(CASE, "fastpref", BUDGET)
    assert row["peak"] > row["gradients"] + row["logits"]


@pytest.mark.slow
@pytest.mark.heavy
def test_in_trl_a_step_takes_what_its_adapter_would_on_a_gpu() -> None:
    """Beside TRL's own head, whose tile and gradient hold the exponentials here."""
    row = measure(CASE, "fastpref in TRL", BUDGET)
    budget = (1024 * 32768 + 32000 * 64) * 4 / 2**20
    assert row["logits"] < row["peak"] < min(budget, row["gradients"] + row["workspace"]) + 16


@pytest.mark.slow
@pytest.mark.heavy
def test_of_an_alternative() -> None:
    row = measure(CASE, "plain torch", BUDGET)
    assert row["workspace"] is None and row["implementation"] == "plain torch"
    # Logits of all 2048 positions, their log-softmax, and its gradient.
    assert row["peak"] > 4 * row["logits"]


def test_names() -> None:
    found = names(CASE, BUDGET, compiling=True)
    assert found[:5] == [
        "fastpref",
        "fastpref, recompute, 16 MiB",
        "fastpref, batches, 16 MiB",
        "fastpref in TRL",
        PROJECTED,
    ]
    assert {"plain torch", "torch.compile"} <= set(found)
    assert "torch.compile" not in names(CASE, BUDGET, compiling=False)


@pytest.mark.slow
@pytest.mark.heavy
def test_a_projected_gradient_takes_less_than_the_weight() -> None:
    case = Case("score", "trainable head", shape=Shape(2, 64, 1024, 8000))
    dense, low = (measure(case, name, BUDGET)["peak"] for name in ("fastpref", PROJECTED))
    assert low < dense - 8000 * (1024 - 3 * RANK) * 4 / 2**20


@pytest.mark.slow
@pytest.mark.heavy
def test_failure_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"memory failed: KeyError: 'no such thing'$"):
        measure(Case("score", "trainable head", shape=Shape(2, 8, 8, 50)), "no such thing", 1)
