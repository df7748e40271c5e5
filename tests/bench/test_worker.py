# SPDX-License-Identifier: Apache-2.0
"""Cases in a process of their own."""

import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from fastpref.bench.experiment import Case
from fastpref.bench.work import Shape
from fastpref.bench.worker import Worker

CASE = Case("divergence", "forward", shape=Shape(2, 8, 16, 64))


def troubled(connection: Connection) -> None:
    """A process in which one candidate fails, one kills it and one hangs, until they are left out;
    without the last of them, and without a case, it fails by itself."""
    while True:
        case, _, only, _, left_out = connection.recv()
        if "none" in only:
            connection.send(("failed", "ValueError: no case"))
            continue
        for name in ("fails", "kills", "hangs"):
            if name in left_out:
                continue
            connection.send(("doing", f"checking {name}"))
            if name == "fails":
                connection.send(("failed", "AcceleratorError: gone"))
                time.sleep(60)
            if name == "kills":
                os._exit(3)
            time.sleep(60)
        connection.send(("done", {"skipped": left_out, "what": case.what}))


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(patience=15, target=troubled)
    yield made
    made.close()


def quietly(text: str) -> None:
    return None


def test_a_candidate_that_takes_the_process_down_is_left_out(worker: Worker) -> None:
    said: list[str] = []
    row = worker.measure(CASE, 1, said.append)
    assert row == {
        "what": "divergence",
        "skipped": {
            "fails": "AcceleratorError: gone",
            "kills": "its process died",
            "hangs": "no answer for 15 s",
        },
    }
    assert said == ["checking fails", "checking kills", "checking hangs"]


def test_a_case_that_fails_by_itself_is_an_error_and_the_next_one_runs(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="setting up: ValueError: no case"):
        worker.measure(CASE, 1, quietly, only=("none",))
    assert worker.process is None
    assert worker.measure(CASE, 1, quietly)["what"] == "divergence"


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
