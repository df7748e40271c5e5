# SPDX-License-Identifier: Apache-2.0
"""Calls and cases in a process of their own."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastpref.bench import worker as module
from fastpref.bench.experiment import Case
from fastpref.bench.work import Shape
from fastpref.bench.worker import Worker
from fastpref.isolation import Lost

pytestmark = pytest.mark.heavy

CASE = Case("divergence", "forward", shape=Shape(2, 8, 16, 64))
SAY = Callable[[str], None]


def troubled(
    case: Case, rounds: int, only: tuple[str, ...], compiling: bool, left_out: Any, say: SAY
) -> dict[str, Any]:
    """One candidate fails, one kills the process and one hangs, until they are left out."""
    if "none" in only:
        raise ValueError("no case")
    for name in ("fails", "kills", "hangs"):
        if name in left_out:
            continue
        say(f"checking {name}")
        if name == "fails":
            raise RuntimeError("gone")
        if name == "kills":
            os._exit(3)
        time.sleep(60)
    return {"skipped": dict(left_out), "what": case.what}


def doubled(number: int, say: SAY) -> int:
    say("doubling")
    return 2 * number


def sleeps(seconds: float, say: SAY) -> None:
    say("sleeping")
    time.sleep(seconds)


def dies(say: SAY) -> None:
    os._exit(3)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(patience=15)
    yield made
    made.close()


def quietly(text: str) -> None:
    return None


@pytest.mark.slow
def test_a_candidate_that_takes_the_process_down_is_left_out(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measured", troubled)
    said: list[str] = []
    row = worker.measure(CASE, 1, said.append)
    reasons = {
        "fails": "RuntimeError: gone",
        "kills": "its process died",
        "hangs": "no answer for 15 s",
    }
    assert row == {"what": "divergence", "skipped": reasons}
    assert said == ["checking fails", "checking kills", "checking hangs"]
    # What cost a process once is not tried again in its suite.
    assert worker.measure(CASE, 1, said.append)["skipped"] == reasons
    assert len(said) == 3


def test_a_case_that_fails_by_itself_is_an_error_and_the_next_one_runs(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measured", troubled)
    with pytest.raises(Lost, match="setting up: ValueError: no case"):
        worker.measure(CASE, 1, quietly, only=("none",))
    assert worker.process is None
    assert worker.call(doubled, 4) == 8


def test_a_call_ends_in_time(worker: Worker) -> None:
    worker.call(doubled, 1)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="cut short while sleeping"):
        worker.call(sleeps, 60.0, until=begin + 2)
    assert time.monotonic() - begin < 10 and worker.process is None


def test_a_call_that_dies(worker: Worker) -> None:
    with pytest.raises(Lost, match="setting up: its process died"):
        worker.call(dies)


def test_as_in_this_process() -> None:
    made = Worker()
    try:
        names = ("plain torch", "fastpref")
        row: dict[str, Any] = made.measure(CASE, 2, quietly, names, compiling=False)
        first = made.process
        assert set(row["timings"]) == {"bare products", *names}
        assert made.measure(CASE, 1, quietly, names)["what"] == "divergence"
        assert made.process is first
    finally:
        made.close()
