# SPDX-License-Identifier: Apache-2.0
"""pytest within a time limit, and what its lines say."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fastpref.bench import pytests

ALONE = """
tests/gpu/test_scoring.py::test_logp[auto-kept in part] PASSED          [  1%]
tests/gpu/test_scoring.py::test_logp[b] FAILED                          [  2%]
tests/gpu/test_scoring.py::test_other ERROR                             [  3%]
tests/gpu/test_scoring.py::test_two SKIPPED (no NVIDIA GPU)             [  4%]
FAILED tests/gpu/test_scoring.py::test_logp[b] - AssertionError: 1 > 0
==== 1 failed, 1 passed ====
"""
SIDE_BY_SIDE = """
tests/gpu/test_scoring.py::test_logp[a]
[gw0] [  1%] PASSED tests/gpu/test_scoring.py::test_logp[auto-kept in part]
[gw1] [  2%] FAILED tests/gpu/test_scoring.py::test_logp[b]
[gw1] [  2%] ERROR tests/gpu/test_scoring.py::test_other
[gw0] [ 10%] SKIPPED tests/gpu/test_scoring.py::test_two
==== 1 failed, 1 passed ====
"""


@pytest.mark.parametrize("output", [ALONE, SIDE_BY_SIDE])
def test_lines_of_pytest(output: str) -> None:
    found = pytests.counted(output)
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert found["failed"] == [
        "tests/gpu/test_scoring.py::test_logp[b]",
        "tests/gpu/test_scoring.py::test_other",
    ]
    assert found["last"] == "==== 1 failed, 1 passed ===="


TESTS = """
import time

def test_good():
    assert True

def test_bad():
    assert False

def test_slow():
    time.sleep(120)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    return [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(path)]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "ignored",
    [
        pytest.param(False, id="foreground", marks=pytest.mark.slow),
        pytest.param(True, id="background", marks=pytest.mark.slow),
    ],
)
def test_what_was_cut_short_keeps_what_it_had(
    command: list[str], tmp_path: Path, ignored: bool
) -> None:
    """Also where this process ignores interrupts, as one in the background of a shell does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        cut_short(command, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def cut_short(command: list[str], tmp_path: Path) -> None:
    log = tmp_path / "tests.txt"
    log.write_text("earlier\n")
    begin = time.monotonic()
    # Time for the first two on a busy machine.
    row, finished = pytests.run(command, log, 25.0)
    assert time.monotonic() - begin < 60
    assert not finished and row["exit"] is None
    assert row["passed"] == 1 and [one.rpartition("::")[2] for one in row["failed"]] == ["test_bad"]
    said = log.read_text()
    # It was asked to stop before it was made to: it says why the test failed.
    assert said.startswith("earlier\n") and "KeyboardInterrupt" in said
    assert "assert False" in said


@pytest.mark.slow
@pytest.mark.heavy
def test_what_came_to_its_end(command: list[str]) -> None:
    row, finished = pytests.run([*command, "-k", "good or bad"], None, 120.0)
    assert finished and (row["exit"], row["passed"], len(row["failed"])) == (1, 1, 1)


@pytest.mark.slow
@pytest.mark.heavy
def test_no_tests_at_all(command: list[str]) -> None:
    row, finished = pytests.run([*command, "-k", "none_such"], None, 120.0)
    assert finished and row["exit"] == 5 and "pytest ended with 5: " in row["reason"]


def test_every_test_is_in_one_part() -> None:
    files = {path.name for path in (pytests.ROOT / pytests.FOLDER).glob("test_*.py")}
    named = [os.path.basename(one) for given in pytests.TESTS.values() for one in given]  # noqa: PTH119
    assert files == {one for one in named if one.endswith(".py")}
    assert pytests.unavailable() is None
    assert "--collect-only" in pytests.command("scoring", collect=True)
