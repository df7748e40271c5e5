# SPDX-License-Identifier: Apache-2.0
"""A run within its time: order, shares, what is left, and files that are whole at any moment."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fastpref.bench import drive
from fastpref.bench.drive import Drive, Item, Part


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ran() -> list[str]:
    return []


def items(clock: Clock, ran: list[str], **seconds: float) -> list[Item]:
    """Each takes its seconds, or is cut short."""

    def run(name: str, takes: float, until: float) -> None:
        ran.append(name)
        clock.now = min(clock.now + takes, until)
        if clock.now >= until:
            raise TimeoutError(f"cut short while at {name}")

    return [Item(name, functools.partial(run, name, takes)) for name, takes in seconds.items()]


def test_parts_run_in_order_within_their_share(
    clock: Clock, ran: list[str], tmp_path: Path
) -> None:
    closed: list[str] = []
    first = Part(10, [items(clock, ran, a=4, b=4, c=4, d=4)], lambda: closed.append("first"))
    second = Part(100, [items(clock, ran, e=5, f=30)], lambda: closed.append("second"))
    run = Drive({}, tmp_path, 30, clock=clock)
    run.run([first, second])
    # The third is cut at the end of its part's share, the last one at that of the run.
    assert ran == ["a", "b", "c", "e", "f"] and closed == ["first", "second"]
    assert run.left == {
        "d": drive.NOT_BEGUN,
        "c": "cut short while at c",
        "f": "cut short while at f",
    }
    assert clock.now == 30
    assert json.loads((tmp_path / drive.LEFT).read_text()) == run.left


def test_a_later_run_does_what_was_left(clock: Clock, ran: list[str], tmp_path: Path) -> None:
    parts = [Part(100, [items(clock, ran, a=4, b=4)]), Part(100, [items(clock, ran, c=4)])]
    Drive({"cases": [1]}, tmp_path, 5, clock=clock).run(parts)
    report, left = drive.earlier(tmp_path)
    assert report == {"cases": [1]} and list(left) == ["c", "b"] and ran == ["a", "b"]
    ran.clear()
    again = Drive(report, tmp_path, 1000, left, clock=clock)
    again.run(parts)
    assert ran == ["b", "c"] and drive.earlier(tmp_path) == ({"cases": [1]}, {})


def test_what_fails_costs_nothing_else(
    clock: Clock, ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(until: float) -> None:
        raise MemoryError("too large")

    parts = [Part(100, [[Item("big", fails), *items(clock, ran, a=1)]])]
    run = Drive({}, tmp_path, 100, clock=clock)
    run.run(parts)
    assert ran == ["a"] and run.left == {}
    assert run.report["failed"] == {"big": "MemoryError: too large"}
    assert "big: not measured, MemoryError: too large" in capsys.readouterr().out


def test_a_run_that_is_killed_leaves_what_it_had(
    clock: Clock, ran: list[str], tmp_path: Path
) -> None:
    run = Drive({}, tmp_path, 100, clock=clock)

    def adds(until: float) -> None:
        every = dict.fromkeys("abc", drive.NOT_BEGUN)
        assert drive.earlier(tmp_path) == ({}, every)
        run.add("checks", {"case": "a"}, "a: ok")
        # Before it is done with, its row is in the file.
        assert drive.earlier(tmp_path) == ({"checks": [{"case": "a"}]}, every)

    def is_killed(until: float) -> None:
        assert drive.earlier(tmp_path) == (
            {"checks": [{"case": "a"}]},
            {"b": drive.NOT_BEGUN, "c": drive.NOT_BEGUN},
        )
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run([Part(100, [[Item("a", adds), Item("b", is_killed), *items(clock, ran, c=1)]])])
    assert list(drive.earlier(tmp_path)[1]) == ["b", "c"] and "failed" not in run.report
    assert sorted(path.name for path in tmp_path.iterdir()) == [drive.REPORT, drive.LEFT]


def test_a_file_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / drive.REPORT
    drive.write(path, {"cases": [1]})
    unwritable: dict[str, Any] = {"cases": [1, object()]}
    with pytest.raises(TypeError):
        drive.write(path, unwritable)
    assert json.loads(path.read_text()) == {"cases": [1]}

    def dies(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        drive.write(path, {"cases": [1, 2]})
    assert json.loads(path.read_text()) == {"cases": [1]}


def test_lanes_run_side_by_side(tmp_path: Path) -> None:
    meet = threading.Barrier(2, timeout=30)

    def waits(until: float) -> None:
        meet.wait()

    run = Drive({}, tmp_path, 1000)
    run.clock = lambda: 0.0
    run.run([Part(100, [[Item("a", waits)], [Item("b", waits)]])])
    assert run.left == {} and "failed" not in run.report


def test_an_earlier_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--more must be a folder that --suite gpu --out wrote"):
        drive.earlier(tmp_path)


def test_the_age_of_this_process() -> None:
    assert 0.5 < drive.age() < 1e5
