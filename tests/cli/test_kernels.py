# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref kernels``: its table, and what it says where it cannot compile.

The numbers are checked in tests/kernels/test_resources.py.
"""

import argparse
import json
import signal
import sys
from typing import Any

import pytest

from fastpref.cli import kernels, progress
from tests.bench.counted import COMPILED, LAUNCHED

ROW = {
    "name": "linear_exp store",
    "capability": 90,
    "element": "bf16",
    "registers": 183,
    "stack": 0,
    "local_accesses": 0,
    "shared_memory": 164000,
    "matrix_instructions": 4,
    "tensor_loads": 6,
    "epilogue": 6.92,
    "problems": [],
}


def run(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], *options: str) -> int:
    monkeypatch.setattr(kernels, "_variants", lambda capability, element: rows)
    monkeypatch.setattr(kernels, "_compile", lambda task: rows[task[2]] | _of(task))
    monkeypatch.setattr(kernels, "_compile_anew", lambda wanted: COMPILED)
    monkeypatch.setattr(kernels.launches, "measured", lambda: {"rows": LAUNCHED})
    monkeypatch.setattr(kernels, "_pool", _InProcess)
    parser = argparse.ArgumentParser()
    kernels.add_parser(parser.add_subparsers())
    return kernels.run(parser.parse_args(["kernels", *options]))


def _of(task: tuple[int, str, int]) -> dict[str, Any]:
    return {"capability": task[0], "element": task[1]}


class _InProcess:
    def __init__(self, processes: int | None = None) -> None:
        pass

    def __enter__(self) -> "_InProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def imap(self, function: Any, values: Any, at_once: int) -> Any:
        return map(function, values)

    def apply(self, function: Any, given: Any) -> Any:
        return function(*given)


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, [ROW], "--capability", "90", "--element", "bf16") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "sm_90, bf16"
    assert said[2].split() == ["linear_exp", "store", "183", "0", "164000", "4", "6", "6.92"]
    assert said[3] == "" and said[4].startswith("sm_90, bf16, rows tier")


def test_the_rows_tier_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, [ROW], "--rows", "--capability", "90") == 0
    said = capsys.readouterr().out
    assert "linear_exp" not in said and said.count("rows tier") == 3
    assert said.startswith("sm_90, bf16, rows tier")


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, [ROW], "--json", "--capability", "90", "--element", "bf16") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == [ROW]
    first = found["rows tier"][0]
    assert (first["capability"], first["element"], first["call"]) == (90, "bf16", "no gradient")


def test_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And how long the rest takes; on a terminal alone."""
    given = ("--capability", "90", "--element", "bf16")
    assert run(monkeypatch, [ROW, ROW], *given) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(monkeypatch, [ROW, ROW], *given) == 0
    said = capsys.readouterr().err
    assert "compiling variants: 1 of 2, about 10 s left" in said
    assert "compiling the rows tier: 0 of 1" in said
    assert [progress.duration(one) for one in (94, 120)] == ["90 s", "2 minutes"]


def test_a_problem_fails_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, [ROW, ROW | {"problems": ["spills"]}]) == 1
    said = capsys.readouterr().out
    assert said.count("spills") == 12  # four chips, three element types
    assert "sm_80, fp16" in said and "sm_100, fp32" in said


def test_a_problem_of_the_rows_tier_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spilling = COMPILED["exp_rows"] | {"problems": ["spills"]}
    monkeypatch.setitem(COMPILED, "exp_rows", spilling)
    assert run(monkeypatch, [], "--rows", "--capability", "90", "--element", "bf16") == 1
    said = capsys.readouterr().out
    assert "exp_rows spills" in said


@pytest.mark.heavy
def test_an_interrupt_is_none_of_the_processes_that_compile() -> None:
    with kernels._pool(1) as pool:
        assert pool.apply(signal.getsignal, (signal.SIGINT,)) is signal.SIG_IGN


def test_the_interpreter_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(monkeypatch, [ROW]) == 2
    assert "TRITON_INTERPRET=1 compiles nothing; unset it" in capsys.readouterr().err


def test_without_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert run(monkeypatch, [ROW]) == 1
    assert "pip install triton" in capsys.readouterr().err
