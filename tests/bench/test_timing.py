# SPDX-License-Identifier: Apache-2.0
"""Interleaving and the ratios taken round by round, on a clock of the test's own."""

from __future__ import annotations

import functools

import pytest

from fastpref.bench import timing
from fastpref.bench.timing import interleave


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    order: list[str] = []
    # The machine is twice as slow in the second round; ratios must not see it.
    speed = iter([1.0, 1.0, 2.0, 2.0, 1.0, 1.0])

    def runs(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds * next(speed)

    candidates = {"limit": lambda: runs("limit", 1.0), "other": lambda: runs("other", 1.5)}
    result = interleave(candidates, "limit", 3, lambda text: None)
    assert [set(order[at : at + 2]) for at in (0, 2, 4)] == [{"limit", "other"}] * 3
    assert result["other"].ratio == pytest.approx(1.5)
    assert result["other"].low == result["other"].high == pytest.approx(1.5)
    assert result["other"].seconds == pytest.approx(1.5)
    assert result["limit"].ratio == 1.0


def test_progress_names_the_round() -> None:
    said: list[str] = []
    interleave({"limit": lambda: None}, "limit", 2, said.append)
    assert said == ["round 1 of 2", "round 2 of 2"]


def test_rounds_differ_in_order() -> None:
    order: list[str] = []
    candidates = {name: functools.partial(order.append, name) for name in "abc"}
    interleave(candidates, "a", 8, lambda text: None)
    rounds = {tuple(order[at : at + 3]) for at in range(0, 24, 3)}
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(rounds) > 1
