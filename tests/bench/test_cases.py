# SPDX-License-Identifier: Apache-2.0
"""What is timed, what is not and why, and what a row says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fastpref.bench import cases, timing
from fastpref.bench.cases import LIMIT, measure
from fastpref.bench.experiment import Candidate, Case, Experiment, Outcome
from fastpref.bench.suites import SUITES
from fastpref.bench.work import Shape

CASE = Case("score", "trainable head", "float32", Shape(4, 16, 8, 50))


def result(value: float) -> Outcome:
    return Outcome(torch.tensor(1.0), (torch.full((3,), value),))


def fails() -> Outcome:
    raise RuntimeError("no kernel image\nand more")


def candidate(name: str, run: Callable[[], Outcome], **facts: object) -> Candidate:
    return Candidate(name, run, lambda: result(1.0), **facts)  # type: ignore[arg-type]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what ran, in order."""
    found: list[str] = []

    def right(name: str) -> Callable[[], Outcome]:
        def run() -> Outcome:
            found.append(name)
            return result(1.0)

        return run

    experiment = Experiment(
        lambda: found.append(LIMIT),
        [
            candidate("right", right("right")),
            candidate("near", lambda: result(1.00005)),
            candidate("far", lambda: result(1.09)),
            candidate("other loss", lambda: Outcome(torch.tensor(1.01), (torch.ones(3),))),
            candidate("nan", lambda: result(float("nan"))),
            candidate("failing", fails),
            candidate("absent", fails, unavailable="not here"),
            candidate("compiled", right("compiled"), compiles=True),
        ],
        entropy=1.5,
    )
    replaced = SUITES["score"]._replace(experiment=lambda case: experiment)
    monkeypatch.setitem(SUITES, "score", replaced)
    monkeypatch.setattr(timing, "SLOW", float("inf"))
    return found


def test_only_what_is_right_is_timed(runs: list[str]) -> None:
    row = measure(CASE, 2, lambda text: None)
    assert list(row["timings"]) == [LIMIT, "right", "near", "compiled"]
    assert row["skipped"] == {
        "far": "wrong: its error against float64 is 9.0e-02",
        "other loss": "wrong: its error against float64 is 1.0e-02",
        "nan": "wrong: its error against float64 is nan",
        "failing": "RuntimeError: no kernel image",
        "absent": "not here",
    }
    assert row["timings"]["near"]["error"] == pytest.approx(5e-5, rel=1e-2)
    assert row["timings"][LIMIT]["error"] is None and row["timings"][LIMIT]["ratio"] == 1
    assert all(one["peak"] is None for one in row["timings"].values())
    assert row["entropy"] == 1.5 and row["what"] == "score" and row["mode"] == "trainable head"
    assert json.loads(json.dumps(row)) == row
    # Once before the rounds, then once in each.
    assert runs.count("right") == runs.count(LIMIT) == 3


def test_what_compiles_can_be_left_out(runs: list[str]) -> None:
    row = measure(CASE, 1, lambda text: None, compiling=False)
    assert "compiled" not in row["timings"] and "compiled" not in runs
    assert "--quick" in row["skipped"]["compiled"]


def test_some_alone(runs: list[str]) -> None:
    row = measure(CASE, 1, lambda text: None, only={"near", "absent"})
    assert list(row["timings"]) == [LIMIT, "near"] and row["skipped"] == {"absent": "not here"}


def test_compiled_functions_start_anew(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cases.torch.compiler, "reset", lambda: seen.append(len(runs)))
    measure(CASE, 1, lambda text: None)
    assert seen == [0]


def test_what_is_allowed_follows_the_dtype(runs: list[str]) -> None:
    row = measure(replace(CASE, dtype="bfloat16"), 1, lambda text: None)
    assert set(row["skipped"]) == {"nan", "failing", "absent"}


def test_progress_says_what_is_checked_and_which_round(runs: list[str]) -> None:
    said: list[str] = []
    measure(CASE, 2, said.append, only={"right"})
    assert said == ["checking right", "round 1 of 2", "round 2 of 2"]
