# SPDX-License-Identifier: Apache-2.0
"""The command: its table, its file, and what it says of peers that are missing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.bench.suites import LIMIT, OVERFLOWING, SUITES
from fastpref.cli import bench


def arguments(**changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", "--quick", "--rounds", "1", "--dtype", "float32"])
    return argparse.Namespace(**(vars(args) | changes))


def test_table_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for what, suite in SUITES.items():
        one, *others = suite.implementations()
        missing = others[-1]
        absent = type(missing)(missing.name, missing.loss, "left out here")
        plain = next(other for other in others if other.name == "plain torch")
        chosen = [one, plain, absent]
        few = suite._replace(implementations=lambda chosen=chosen: chosen)
        monkeypatch.setitem(SUITES, what, few)
    monkeypatch.setattr(bench, "Shape", lambda *sizes: _tiny())
    monkeypatch.setattr(bench, "measure", lambda *_: _memory_row())
    assert bench.run(arguments(out=tmp_path)) == 0
    said = capsys.readouterr().out
    assert "float32, trainable head" in said and "float32, frozen head" in said
    for peer in ("Liger DPO", "Liger", "Liger JSD"):
        assert f"{peer}: not measured, left out here" in said
    report = json.loads((tmp_path / "bench.json").read_text())
    found = [(case["what"], case["trainable"]) for case in report["cases"]]
    usual = ("score", "dpo", "divergence")
    assert found == [(what, trainable) for what in usual for trainable in (True, False)]
    for case in report["cases"]:
        timings, own = case["timings"], {LIMIT, "fastpref", "plain torch"}
        assert set(timings) == own | ({OVERFLOWING} if case["what"] == "score" else set())
        assert timings["fastpref"]["error"] < 1e-5
        assert timings[LIMIT]["ratio"] == 1.0
    assert len(report["memory"]) == 5


def _tiny() -> Any:
    from fastpref.bench.work import Shape

    return Shape(4, 16, 32, 300)


def _memory_row() -> dict[str, Any]:
    sizes = dict.fromkeys(("peak", "gradients", "workspace", "logits"), 1.0)
    return {"schedule": "keep", "scored": 32, "units": 3.0} | sizes


def test_rounds_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(arguments(rounds=0)) == 2
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
