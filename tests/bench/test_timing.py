# SPDX-License-Identifier: Apache-2.0
"""Interleaving, and the ratios taken round by round, on a clock of the test's own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest

from fastpref.bench import timing
from fastpref.bench.timing import Clock, Timing, interleave

CPU = Clock("cpu")


class FakeClock(Clock):
    """Every call takes the number it returns, times how slow the machine is just then."""

    def __init__(self, slowness: Iterator[float]) -> None:
        super().__init__("cpu")
        self.slowness = slowness

    def __call__(self, call: Callable[[], object]) -> float:
        return float(call()) * next(self.slowness)  # type: ignore[arg-type]


def run(rounds: int, slowness: Iterator[float], **seconds: float) -> dict[str, Timing]:
    candidates = {name: functools.partial(float, value) for name, value in seconds.items()}
    return interleave(candidates, "limit", rounds, FakeClock(slowness), lambda text: None)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is twice as slow in the second round; ratios must not see it.
    slowness = iter([1.0, 1.0, 2.0, 2.0, 1.0, 1.0])
    result = run(3, slowness, limit=1.0, other=1.5)
    assert result["other"] == Timing(1.5, 1.5, 1.5, 1.5)
    assert result["limit"].ratio == 1.0


def test_median_and_spread() -> None:
    values = itertools.count(1)
    candidates = {"limit": lambda: 1.0, "other": lambda: float(next(values))}
    clock = FakeClock(itertools.repeat(1.0))
    # Within SLOW in the first round, so it runs in all ten.
    found = interleave(candidates, "limit", 10, clock, lambda text: None)["other"]
    assert found == Timing(5.5, 5.5, 3.0, 8.0)


def test_the_slow_run_every_second_round() -> None:
    ran: list[str] = []

    def runs(name: str, seconds: float) -> float:
        ran.append(name)
        return seconds

    calls = {"limit": 1.0, "quick": timing.SLOW, "slow": timing.SLOW + 0.1}
    candidates = {name: functools.partial(runs, name, value) for name, value in calls.items()}
    clock = FakeClock(itertools.repeat(1.0))
    result = interleave(candidates, "limit", 5, clock, lambda text: None)
    assert [ran.count(name) for name in calls] == [5, 5, 3]
    assert result["slow"].ratio == pytest.approx(timing.SLOW + 0.1)


def put(order: list[str], name: str) -> float:
    order.append(name)
    return 1.0


def test_progress_names_the_round() -> None:
    said: list[str] = []
    interleave({"limit": lambda: None}, "limit", 2, CPU, said.append)
    assert said == ["round 1 of 2", "round 2 of 2"]


def test_rounds_differ_in_order() -> None:
    order: list[str] = []
    candidates = {name: functools.partial(put, order, name) for name in "abc"}
    interleave(candidates, "a", 8, FakeClock(itertools.repeat(1.0)), lambda text: None)
    rounds = {tuple(order[at : at + 3]) for at in range(0, 24, 3)}
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(rounds) > 1


def test_the_clock_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 2.0

    assert CPU(call) == 2.0
    assert CPU.peak(call) is None and now == [7.0]
    CPU.warm(call)
    assert now == [7.0]
