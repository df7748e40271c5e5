# SPDX-License-Identifier: Apache-2.0
"""The same results in a terminal, as CSV, Markdown and pictures, drawn again from their JSON."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.bench import report as reporting
from fastpref.bench.suites import LIMIT, OVERFLOWING
from fastpref.cli.main import main


def timing(ratio: float, error: float | None) -> dict[str, Any]:
    return {
        "seconds": ratio / 10,
        "ratio": ratio,
        "low": ratio - 0.1,
        "high": ratio + 0.1,
        "error": error,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    cases = [
        {
            "what": what,
            "dtype": "float32",
            "trainable": trainable,
            "timings": {
                LIMIT: timing(1.0, None),
                "fastpref": timing(1.25, 1e-6),
                **({OVERFLOWING: timing(1.5, None)} if what == "score" else {}),
                "plain torch": timing(4.0, 2e-6),
            },
            "skipped": {"Liger": "liger_kernel is not installed"},
        }
        for what in ("score", "divergence")
        for trainable in (True, False)
    ]
    memory = [
        {
            "schedule": "recompute",
            "budget": 32,
            "scored": scored,
            "peak": 40.0,
            "gradients": 30.0,
            "workspace": 50.0,
            "logits": scored / 8,
        }
        for scored in (2048, 4096)
    ]
    shape = {"sequences": 8, "length": 256, "hidden_size": 64, "vocab_size": 500, "masked": 0.25}
    machine = {"processor": "a chip", "threads": 2, "torch": "2.13.0", "python": "3.11"}
    return {"machine": machine, "shape": shape, "cases": cases, "memory": memory}


def test_terminal(report: dict[str, Any]) -> None:
    said = reporting.terminal(report)
    assert "N=1536 scored of 2048 positions, H=64, V=500, 2 threads" in said
    assert "scores and DPO: float32, trainable head" in said
    assert "linear_divergence, forward KL: float32, frozen head" in said
    assert "125.0ms   1.25x  1.15x  1.35x   1.0e-06" in said
    assert "1% overflowing rows cost 1.20x" in said
    assert said.count("Liger: not measured, liger_kernel is not installed") == 4
    assert "recompute, budget 32" in said


def test_comma_separated(report: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(reporting.comma_separated(report))))
    assert tuple(rows[0]) == reporting.COLUMNS
    assert len(rows) == sum(len(case["timings"]) for case in report["cases"])
    own = [row for row in rows if row["implementation"] == "plain torch"]
    assert [(row["what"], row["head"]) for row in own] == [
        ("score", "trainable"),
        ("score", "frozen"),
        ("divergence", "trainable"),
        ("divergence", "frozen"),
    ]
    assert float(own[0]["ratio"]) == 4.0 and float(own[0]["error"]) == 2e-6


def test_markdown(report: dict[str, Any]) -> None:
    score, divergence = reporting.markdown(report).split("\n\n")
    assert score.splitlines()[0] == (
        "| scores and DPO | float32, trainable head | float32, frozen head |"
    )
    assert "| plain torch | 4.00x | 4.00x |" in score and LIMIT not in score
    assert OVERFLOWING in score and OVERFLOWING not in divergence


def test_pictures(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = reporting.pictures(report, tmp_path / "new")
    assert [path.name for path in written] == [
        "score-ratio.png",
        "score-error.png",
        "divergence-ratio.png",
        "divergence-error.png",
        "memory.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_redrawn_from_a_file(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    assert main(["bench", "--report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert reporting.terminal(report) in capsys.readouterr().out
    assert (tmp_path / "out" / "bench.csv").read_text() == reporting.comma_separated(report)
    assert (tmp_path / "out" / "bench.md").exists()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_file_that_is_none(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", "--report", str(path)]) == 2
    assert "--report must be a file that --out wrote" in capsys.readouterr().err


def readme_script() -> Any:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_in_the_readme(report: dict[str, Any]) -> None:
    script = readme_script()
    text = f"before\n{script.START}\nold\n{script.END}\nafter"
    found = script.with_tables(text, reporting.markdown(report))
    assert found.startswith("before\n") and found.endswith("\nafter") and "old" not in found
    assert script.with_tables(found, reporting.markdown(report)) == found
    with pytest.raises(ValueError, match="once each"):
        script.with_tables("no marks", "tables")


def test_the_readme_has_the_tables_of_the_newest_results() -> None:
    root = Path(__file__).resolve().parents[2]
    results = sorted((root / "benchmarks" / "results").glob("*-cpu.json"))
    if not results:
        pytest.skip("no results beside this copy of the tests")
    tables = reporting.markdown(json.loads(results[-1].read_text()))
    assert tables in (root / "README.md").read_text(encoding="utf-8")
