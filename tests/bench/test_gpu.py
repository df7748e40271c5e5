# SPDX-License-Identifier: Apache-2.0
"""What would be measured on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fastpref.bench import gpu
from fastpref.bench import report as reporting
from fastpref.bench.checks import CHECKS
from fastpref.bench.drive import Drive, Part
from fastpref.bench.experiment import MODES
from fastpref.bench.lanes import Lane, lanes
from fastpref.bench.suites import SUITES
from fastpref.isolation import Lost

ROOT = Path(__file__).resolve().parents[2]


def quietly(text: str) -> None:
    return None


def test_the_timings_are_of_every_head() -> None:
    found = [case for case, _ in gpu.timings("cuda")]
    assert len(set(found)) == len(found) == 15
    assert {(case.shape.scored, case.shape.masked, case.dtype) for case in found} == {
        (8192, 0.0, "bfloat16")
    }
    sizes = [(case.shape.hidden_size, case.shape.vocab_size) for case in found]
    assert list(dict.fromkeys(sizes)) == [(4096, 128256), (2048, 128256), (896, 151936)]
    asked = [(case.what, case.mode) for case in found[:5]]
    assert asked[:3] == [("head", mode) for mode in reversed(MODES)]
    assert asked[3:] == [("call", "trainable head"), ("call", "frozen head")]


def test_the_cases_are_cases() -> None:
    found = [case for case, _ in (*gpu.timings("cuda"), *gpu.cases("cuda"))]
    assert len(set(found)) == len(found)
    for case in found:
        assert case.mode in SUITES[case.what].modes and case.device == "cuda"
        assert case.shape.scored == 8192
    assert {case.what for case in found} == set(SUITES)
    assert {case.logits for case in found} == {"trained", "random"}
    assert [case.shape.scored for case in gpu.memory_cases("cuda")] == list(gpu.TOKENS)


def test_the_trainings_are_of_half_a_billion_parameters() -> None:
    found = gpu.trainings_of("cuda")
    assert [one.method for one in found] == ["dpo", "dpo", "orpo", "simpo", "tpo"]
    assert {(one.hidden, one.layers, one.vocabulary) for one in found} == {(896, 24, 151936)}


@pytest.mark.slow
@pytest.mark.heavy
def test_a_training_within_its_time_and_without(tmp_path: Path) -> None:
    """At the size that a CPU tries."""
    pytest.importorskip("trl", reason="trl is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    drive = Drive({}, tmp_path, 1e9)
    part = gpu.Run(drive, "cpu", 1, quietly)._trainings()
    drive.run([part._replace(seconds=0.1)])
    assert drive.left == {"train dpo, LoRA": "cut short while it trained"}
    assert "trainings" not in drive.report and "failed" not in drive.report
    drive.run([part._replace(seconds=1e9)])
    (row,) = drive.report["trainings"]
    assert drive.left == {} and row["difference"] < 1e-4
    assert "dpo, LoRA: losses within" in reporting.terminal_trainings([row])


def everything(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = gpu.Found({lane.name: None for lane in lanes(device)}, ["fastpref", "plain torch"])
    monkeypatch.setattr(gpu.Run, "_found", lambda self: there)


def aborts(device: str, say: Any) -> None:
    os.abort()


@pytest.mark.heavy
def test_a_library_that_crashes_when_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_look", aborts)
    drive = Drive({}, tmp_path, 1e9)
    names = [
        item.name
        for part in gpu.Run(drive, "cuda", 1, quietly).parts()
        for lane in part.lanes
        for item in lane
    ]
    assert drive.report["unavailable"] == {}
    assert {f"check {lane.name}: bf16" for lane in lanes("cuda")} <= set(names)


def plan(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """With everything there."""
    everything(device, monkeypatch)
    return gpu.Run(Drive({}, tmp_path, 1e9), device, 1, quietly).parts()


def test_the_most_valuable_comes_first_and_the_time_suffices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = plan("cuda", tmp_path, monkeypatch)
    names = [[item.name for lane in part.lanes for item in lane] for part in parts]
    every = [name for part in names for name in part]
    assert len(set(every)) == len(every)
    firsts = [part[0] for part in names]
    assert firsts[:3] == [
        "check rows: bf16",
        "check fused: bf16",
        "time head, trainable head, N=8192 H=4096 V=128256",
    ]
    # What may take a process down runs beside the others, after what is most likely right.
    assert [len(part.lanes) for part in parts[:3]] == [1, 3, 1]
    after = [name.split()[0] for name in firsts[3:]]
    assert after == ["observe"] * 4 + ["test", "memory", "train", "measure"]
    assert sum(part.seconds for part in parts[:7]) <= gpu.SECONDS < 480
    assert gpu.MORE_SECONDS < 300


@pytest.mark.heavy
def test_a_lane_that_dies_or_hangs_costs_its_checks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dies:
        left_out: ClassVar[dict[str, Any]] = {}

        def __init__(self, patience: float) -> None:
            pass

        def call(self, function: Any, name: str, lane: Lane, device: str, until: float) -> Any:
            if lane.name == "fused":
                raise Lost("", "its process died")
            return {"lane": lane.name, "case": name, "passed": True, "reason": None, "seconds": 1}

        def close(self) -> None:
            pass

    monkeypatch.setattr(gpu, "Worker", Dies)
    everything("cuda", monkeypatch)
    drive = Drive({}, tmp_path, 1e9)
    drive.run(gpu.Run(drive, "cuda", 1, quietly).parts()[:2])
    rows = drive.report["checks"]
    assert len(rows) == 4 * len(CHECKS) and drive.left == {}
    wrong = [row for row in rows if row["passed"] is False]
    assert {(row["lane"], row["reason"]) for row in wrong} == {("fused", "its process died")}
    assert len(wrong) == len(CHECKS) and not gpu.passed(drive.report)
    assert f"fused: {next(iter(CHECKS))}" in capsys.readouterr().out


def bench(*given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastpref", "bench", "--suite", "gpu", "--device", "cpu", *given],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_the_whole_flow_on_a_cpu(tmp_path: Path) -> None:
    """First a run with hardly any time, then the one that does what it left, into another
    folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    done = bench("--out", str(first), "--seconds", "1")
    assert done.returncode == 0, done.stderr
    left = json.loads((first / "left.json").read_text())
    report = json.loads((first / "bench.json").read_text())
    assert len(left) > 40 and not report.get("cases")
    assert "left: check " in done.stdout
    done = bench("--out", str(second), "--seconds", "800", "--more", str(first))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((second / "left.json").read_text()) == {}
    report = json.loads((second / "bench.json").read_text())
    assert "failed" not in report, report["failed"]
    assert set(report["unavailable"]) >= {"cuda"}
    assert {row["lane"] for row in report["checks"]} >= {"torch"}
    assert all(row["passed"] in (True, None) for row in report["checks"])
    asked = [(case["what"], case["mode"]) for case in report["cases"]]
    assert asked == [(case.what, case.mode) for case, _ in (*gpu.timings("cpu"), *gpu.cases("cpu"))]
    assert [row["scored"] for row in report["memory"]] == [64]
    assert [row["method"] for row in report["trainings"]] == ["dpo"]
    assert report["tests"][0]["finished"] and report["tests"][0]["exit"] == 0
    names = {path.name for path in second.iterdir()}
    assert names == {"bench.json", "left.json", "bench.csv", "bench.md", "tests.txt"}
    # Everything is drawn again from the file, and from the one that is nearly empty.
    for folder in (first, second):
        redrawn = json.loads((folder / "bench.json").read_text())
        assert reporting.terminal_summary(redrawn) in reporting.terminal(redrawn)
