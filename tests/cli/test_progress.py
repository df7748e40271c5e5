# SPDX-License-Identifier: Apache-2.0
"""The line on a terminal: what is done, what is left, what runs."""

from __future__ import annotations

import sys

import pytest

from fastpref.cli import progress

# What begins a line anew.
ANEW = "\r\033[K"


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the parts, whose sum is the time."""
    passed = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: sum(passed))
    return passed


def test_parts(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch)
    parts = progress.Parts(18, "comparing ")
    parts.begin("first")
    clock.append(100)
    parts.begin("second")
    parts.detail("round 1 of 3")
    clock.append(200)
    parts.begin("third")
    assert capsys.readouterr().err.split(ANEW)[1:] == [
        "comparing 0 of 18: first",
        "comparing 1 of 18, about 28 minutes left: second",
        "comparing 1 of 18, about 28 minutes left: second, round 1 of 3",
        "comparing 2 of 18, about 40 minutes left: third",
    ]


def test_more_parts_than_were_foreseen(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch)
    parts = progress.Parts(1)
    for name in ("first", "again", "and again"):
        parts.begin(name)
    said = capsys.readouterr().err.split(ANEW)[1:]
    assert said == ["0 of 1: first", "1 of 1: again", "1 of 1: and again"]


def test_counted(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch)
    for _ in progress.counted(range(2), 2, "compiling:"):
        clock.append(60)
    said = capsys.readouterr().err.split(ANEW)[1:]
    assert said == [
        "compiling: 0 of 2",
        "compiling: 1 of 2, about 10 s left",
        "compiling: 2 of 2",
        "",
    ]


def test_a_line_is_no_longer_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "20")
    progress.Parts(3).begin("a name of some length")
    assert capsys.readouterr().err == f"{ANEW}0 of 3: a name of s"


def test_nothing_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    parts = progress.Parts(2)
    parts.begin("first")
    parts.detail("round 1")
    assert list(progress.counted(range(2), 2, "compiling:")) == [0, 1]
    assert capsys.readouterr().err == ""
