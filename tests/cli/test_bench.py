# SPDX-License-Identifier: Apache-2.0
"""The command: what it measures, its files, and what it says of arguments that are wrong."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.bench import cases, drive, gpu, machine, memory, scaling
from fastpref.bench.cases import LIMIT
from fastpref.bench.experiment import MODES, Case
from fastpref.bench.losses import OVERFLOWING
from fastpref.bench.suites import SUITES
from fastpref.bench.work import Shape
from fastpref.cli import bench, progress
from fastpref.cli.main import main

TINY = Shape(4, 16, 32, 300)


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *given])


def memory_row(case: Case, name: str, budget: int) -> dict[str, Any]:
    sizes = dict.fromkeys(("peak", "gradients", "workspace", "logits"), 1.0)
    shape = {"hidden_size": case.shape.hidden_size, "vocab_size": case.shape.vocab_size}
    return {"implementation": name, "dtype": "float32", "scored": case.shape.scored} | sizes | shape


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)
    monkeypatch.setattr(memory, "measure", memory_row)


@pytest.mark.heavy
def test_quick(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments("--quick", "--rounds", "1", "--dtype", "float32", "--out", str(tmp_path))
    assert bench.run(given) == 0
    said = capsys.readouterr().out
    assert "float32, trainable head" in said and "float32, frozen head" in said
    assert "torch.compile: not measured, compiles for seconds first" in said
    report = json.loads((tmp_path / "bench.json").read_text())
    found = [(case["what"], case["mode"]) for case in report["cases"]]
    usual = [what for what in bench.USUAL if what in SUITES]
    assert found == [(what, mode) for what in usual for mode in SUITES[what].modes]
    for case in report["cases"]:
        timings = case["timings"]
        if case["what"] not in ("heads", "low-rank"):
            assert {LIMIT, "fastpref", "plain torch"} <= set(timings)
            assert timings["fastpref"]["error"] < 1e-5
        assert (OVERFLOWING in timings) == (case["what"] == "score")
        assert timings[LIMIT]["ratio"] == 1.0
    assert [row["implementation"] for row in report["memory"]][:1] == ["fastpref"]
    assert {path.name for path in tmp_path.iterdir()} >= {"bench.json", "bench.csv", "bench.md"}
    assert main(["bench", "--report", str(tmp_path / "bench.json")]) == 0
    assert capsys.readouterr().out.strip() in said


def test_axes_choose_cases() -> None:
    args = arguments(
        *("--what", "simpo", "--what", "heads", "--dtype", "bfloat16", "--mode", "frozen head"),
        *("--mode", "forward", "--model", "qwen2.5-0.5b", "--length", "64", "--masked", "0.25"),
        *("--logits", "random"),
    )
    shape = Shape(8, 64, 896, 151936, 0.25)
    assert list(bench._chosen(args)) == [
        Case("simpo", "frozen head", "bfloat16", shape, "random"),
        Case("simpo", "forward", "bfloat16", shape, "random"),
        Case("heads", "forward", "bfloat16", shape, "random"),
    ]


def test_the_usual_cases() -> None:
    cases = list(bench._chosen(arguments()))
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert {case.shape for case in cases} == {Shape(8, 256, 1024, 32000, 0.5)}
    assert [case.mode for case in cases if case.what == "dpo"] == 2 * list(MODES)


def test_vocabularies_of_images() -> None:
    """DDO at each; every token is scored."""
    given = ("--what", "images", "--mode", "frozen head", "--dtype", "float32")
    cases = list(bench._chosen(arguments(*given)))
    assert [case.shape.vocab_size for case in cases] == [4096, 16384, 65536, 184622]
    assert {(case.what, case.mode, case.shape.masked) for case in cases} == {
        ("ddo", "frozen head", 0.0)
    }
    assert {case.shape.hidden_size for case in cases} == {256}
    quick = list(bench._chosen(arguments("--quick", *given)))
    assert [case.shape.vocab_size for case in quick] == [case.shape.vocab_size for case in cases]
    assert max(case.shape.scored * case.shape.vocab_size for case in quick) <= 2**23


@pytest.mark.parametrize("name", ["plain torch", "fastpref, torch backend"])
def test_one_implementation(tiny: None, tmp_path: Path, name: str) -> None:
    given = ["--quick", "--rounds", "1", "--what", "score", "--mode", "forward"]
    given += ["--implementation", name, "--dtype", "float32", "--out", str(tmp_path)]
    assert bench.run(arguments(*given)) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [list(case["timings"]) for case in report["cases"]] == [[LIMIT, name]]
    assert "memory" not in report
    redrawn = tmp_path / "new" / "redrawn"
    given = ["--report", str(tmp_path / "bench.json"), "--out", str(redrawn)]
    assert bench.run(arguments(*given)) == 0 and (redrawn / "bench.csv").is_file()


SLOW = "this processor has no bfloat16 instructions"


def slow_at(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A processor that multiplies these dtypes slowly."""
    slow = [getattr(torch, name) for name in names]
    monkeypatch.setattr(bench, "slow_reason", lambda dtype, device: SLOW if dtype in slow else None)


@pytest.mark.parametrize("slow", [("bfloat16", "float16"), ()])
def test_quick_leaves_out_what_the_processor_multiplies_slowly(
    tiny: None,
    slow: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And says so, and how it is measured all the same."""
    slow_at(monkeypatch, *slow)
    given = ["--quick", "--rounds", "1", "--what", "score", "--mode", "forward"]
    given += ["--implementation", "plain torch", "--out", str(tmp_path)]
    assert bench.run(arguments(*given)) == 0
    said = capsys.readouterr().out
    line = f"bfloat16 left out of --quick: {SLOW}; --dtype bfloat16 measures it\n"
    report = json.loads((tmp_path / "bench.json").read_text())
    dtypes = ["float32"] if slow else ["float32", "bfloat16"]
    assert [case["dtype"] for case in report["cases"]] == dtypes
    assert report.get("left_out", {}) == ({"bfloat16": SLOW} if slow else {})
    assert (line in said) == bool(slow) == ("left out" in said)
    assert bench.run(arguments("--report", str(tmp_path / "bench.json"))) == 0
    assert capsys.readouterr().out.strip() in said


@pytest.mark.parametrize(
    "given, dtypes",
    [
        (("--quick",), {"float32"}),
        (("--quick", "--what", "images"), {"float32"}),
        (("--quick", "--dtype", "float16", "--dtype", "bfloat16"), {"float16", "bfloat16"}),
        ((), {"float32", "bfloat16"}),
    ],
)
def test_what_is_asked_for_is_measured_however_slow(
    given: tuple[str, ...], dtypes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_at(monkeypatch, "bfloat16", "float16")
    assert {case.dtype for case in bench._chosen(arguments(*given))} == dtypes


def test_memory_alone(tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow_at(monkeypatch, "bfloat16")
    given = ["--quick", "--what", "memory", "--implementation", "plain torch"]
    assert bench.run(arguments(*given, "--out", str(tmp_path))) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["cases"] == [] and "left_out" not in report
    assert [(row["implementation"], row["scored"]) for row in report["memory"]] == [
        ("plain torch", bench.MEMORY_TOKENS[0])
    ]
    sizes = [(row["hidden_size"], row["vocab_size"]) for row in report["memory"]]
    assert sizes == [(TINY.hidden_size, TINY.vocab_size)]
    given[-1] = "torch.compile"  # for longer than what is quick takes
    assert bench.run(arguments(*given, "--out", str(tmp_path))) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["memory"] == []


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")


def said_at_begins(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Without how long the rest will take."""
    said = re.sub(", about [^:]* left", "", capsys.readouterr().err).split("\r\033[K")
    return [
        one for one in said if re.fullmatch(r"\d+ of \d+: [^:]*", one) and "checking" not in one
    ]


def test_how_far_cases_memory_and_trainings_are(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One count of all."""
    on_a_terminal(monkeypatch)

    def measure(case: Case, rounds: int, say: Any, *given: Any) -> Any:
        say("checking fastpref")
        raise RuntimeError("not here")

    def trained(training: Any, pairs: Path) -> Any:
        raise RuntimeError("not here")

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench.trainings, "measure", trained)
    monkeypatch.setattr(bench.trainings, "unavailable", lambda: None)
    given = ["--quick", "--what", "score", "--what", "memory", "--what", "trainers"]
    assert bench.run(arguments(*given, "--dtype", "float32")) == 0
    said = said_at_begins(capsys)
    assert [one.split(": ")[0] for one in said] == [f"{at} of 11" for at in range(11)]
    assert said[0] == "0 of 11: score, float32, forward"
    assert said[3] == "3 of 11: memory of fastpref, N=512"
    assert said[10].startswith("10 of 11: training of ")


def test_how_far_growth_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch)

    def point(axis: str, size: int, rounds: int, device: str, say: Any) -> dict[str, Any]:
        say("checking fastpref")
        sizes = dict.fromkeys(("workspace", "rows", "logits", "seconds", "products"), 5.0)
        return {"size": size} | sizes

    monkeypatch.setattr(scaling, "point", point)
    assert bench.run(arguments("--suite", "scaling", "--quick")) == 0
    said = capsys.readouterr().err
    assert "0 of 6: N=256, checking fastpref" in said and "5 of 6, about 10 s left: H=512" in said


def test_how_far_a_run_on_a_gpu_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch)

    class Run:
        def __init__(self, run: drive.Drive, device: str, rounds: int, say: Any) -> None:
            say("checking fastpref")

        def parts(self) -> list[drive.Part]:
            return []

    monkeypatch.setattr(gpu, "Run", Run)
    monkeypatch.setattr(drive, "age", lambda: 10.0)
    monkeypatch.setattr(bench.reporting, "terminal_summary", str)
    assert bench.run(arguments("--suite", "gpu", "--device", "cpu", "--seconds", "190")) == 0
    assert "at most 3 minutes left: checking fastpref" in capsys.readouterr().err


def test_what_needs_a_module_says_so(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SUITES, "step", SUITES["step"]._replace(needs="not_a_module"))
    assert bench.run(arguments("--quick", "--what", "step")) == 0
    assert "not measured, not_a_module is not installed" in capsys.readouterr().out


def test_what_fails_costs_nothing_else(
    tiny: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure, of_memory = bench.measure, memory.measure

    def breaks(case: Case, *given: Any, **named: Any) -> Any:
        if case.mode == "forward":
            raise MemoryError("too large")
        return measure(case, *given, **named)

    def breaks_too(case: Case, name: str, budget: int) -> Any:
        if name == "fastpref":
            raise RuntimeError("no such file")
        return of_memory(case, name, budget)

    monkeypatch.setattr(bench, "measure", breaks)
    monkeypatch.setattr(memory, "measure", breaks_too)
    given = ["--quick", "--rounds", "1", "--what", "score", "--what", "memory"]
    given += ["--dtype", "float32", "--mode", "forward", "--mode", "frozen head"]
    assert bench.run(arguments(*given, "--out", str(tmp_path))) == 0
    said = capsys.readouterr().out
    assert "score, float32, forward: not measured, MemoryError: too large" in said
    assert "memory of fastpref, N=512: not measured, no such file" in said
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [case["mode"] for case in report["cases"]] == ["frozen head"]
    assert report["memory"][0]["implementation"] == "plain torch"


def test_a_run_that_is_cut_short_keeps_what_it_has(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = bench.measure

    def breaks(case: Case, *given: Any, **named: Any) -> Any:
        if case.mode == "frozen head":
            raise KeyboardInterrupt
        return measure(case, *given, **named)

    monkeypatch.setattr(bench, "measure", breaks)
    given = arguments("--quick", "--rounds", "1", "--what", "score", "--out", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        bench.run(given)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [case["mode"] for case in report["cases"]] == ["forward"]


def test_scaling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def point(axis: str, size: int, rounds: int, *_: Any) -> dict[str, Any]:
        sizes = dict.fromkeys(("workspace", "rows", "logits"), 5.0)
        return {"size": size, "seconds": size * rounds, "products": size} | sizes

    monkeypatch.setattr(scaling, "point", point)
    given = arguments("--suite", "scaling", "--rounds", "2", "--out", str(tmp_path))
    assert bench.run(given) == 0
    said = capsys.readouterr().out
    for axis in ("N", "V", "H"):
        assert f"time grows with {axis} to the power of: fastpref 1.00, products 1.00" in said
    curves = json.loads((tmp_path / "bench.json").read_text())["curves"]
    assert {axis: tuple(row["size"] for row in rows) for axis, rows in curves.items()} == dict(
        scaling.AXES
    )
    given = arguments("--suite", "scaling", "--quick", "--out", str(tmp_path))
    assert bench.run(given) == 0
    curves = json.loads((tmp_path / "bench.json").read_text())["curves"]
    assert {len(rows) for rows in curves.values()} == {2}


def test_quick_trainings_are_small(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And asked for: not among the usual."""
    asked: list[Any] = []

    def measure(training: Any, pairs: Path) -> Any:
        asked.append(training)
        raise RuntimeError("not here")

    monkeypatch.setattr(bench.trainings, "measure", measure)
    monkeypatch.setattr(bench.trainings, "unavailable", lambda: None)
    assert bench.run(arguments("--quick", "--what", "trainers", "--out", str(tmp_path))) == 0
    assert {training.layers for training in asked} == {bench.trainings.QUICK["layers"]}
    assert bench.TRAINERS in bench._what(arguments())
    assert bench.TRAINERS not in bench._what(arguments("--quick"))


@pytest.mark.parametrize(
    "given, said",
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--masked", "1"), "--masked must be in [0, 1), got 1.0"),
        (("--length", "1"), "--length must be at least 2"),
        (("--length", "4", "--masked", "0.9"), "leave a scored position at --masked 0.9, got 4"),
        (("--quick", "--masked", "0.995"), "leave a scored position at --masked 0.995, got 64"),
        (
            ("--what", "score", "--implementation", "plain toch"),
            "--implementation 'plain toch' is not known; did you mean 'plain torch'? Choose from",
        ),
        (
            ("--what", "score", "--implementation", "a"),
            "'a' is not known. Choose from: Cut Cross-E",
        ),
        (("--what", "heads", "--mode", "frozen head"), "heads has no such --mode"),
        (("--suite", "gpu", "--seconds", "0"), "--seconds must be positive, got 0.0"),
        (("--suite", "gpu", "--seconds", "nan"), "--seconds must be positive, got nan"),
        (("--rounds", str(2**31)), "--rounds must be at most 2147483647, got 2147483648"),
        (("--threads", "1025"), "--threads must be at most 1024, got 1025"),
        (("--length", 400 * "9"), "--length must be at most 2147483647, got 999"),
        (
            ("--suite", "gpu", "--more", "none"),
            "--more must be a folder that --suite gpu --out wrote, got none",
        ),
        (("--out", __file__), "--out must be a folder that can be written to"),
        (("--out", f"{__file__}/deeper"), "--out must be a folder that can be written to"),
        (("--report", __file__, "--out", __file__), "--out must be a folder"),
        (("--suite", "scaling", "--length", "5"), "--length is of --suite cases"),
        (("--suite", "scaling", "--pairs", "f"), "--pairs is of --suite cases"),
        (("--suite", "gpu", "--quick"), "--quick is of --suite cases and scaling"),
        (("--suite", "cases", "--seconds", "4"), "--seconds is of --suite gpu"),
        (("--more", "none", "--seconds", "0"), "--seconds and --more are of --suite gpu"),
        (("--what", "score", "--pairs", "f"), "--pairs is of --what trainers"),
        (("--quick", "--pairs", "f"), "--pairs is of --what trainers"),
        (("--what", "memory", "--rounds", "2"), "--rounds is of --what but memory and trainers"),
        (
            ("--what", "memory", "--what", "trainers", "--dtype", "float32", "--masked", "0.1"),
            "--dtype and --masked are of --what but memory and trainers",
        ),
        (("--what", "trainers", "--implementation", "f"), "--implementation is of --what but trai"),
        (("--report", "f", "--suite", "gpu"), "--suite is not of --report, which measures nothing"),
        (("--report", "f", "--quick"), "--quick is not of --report"),
        (("--what", "trainers", "--pairs", "none"), "got none: cannot be read: No such file"),
        (("--pairs", "/dev/null"), "--pairs must be a file of pairs, JSON with"),
        (("--pairs", "/dev/null"), "got /dev/null: 0 examples, expected at least 10"),
        (("--pairs", __file__), "test_bench.py, line 1: broken JSON"),
    ],
)
def test_wrong_arguments(
    given: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "_Run", None)  # before any work
    assert bench.run(arguments(*given)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("given", [("--what", "score"), ("--suite", "gpu"), ("--report", __file__)])
def test_a_folder_that_cannot_be_written_to(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_Run", None)
    assert bench.run(arguments(*given, "--out", "/proc/new")) == 2
    said = "--out must be a folder that can be written to, got /proc/new: "
    assert said in capsys.readouterr().err


def test_what_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("--what", "score", "--implementation", "none", "--out", str(out))
    assert bench.run(arguments(*given)) == 2 and not out.exists()
    assert bench.run(arguments("--report", "none", "--out", str(out))) == 2 and not out.exists()


def test_every_option_is_in_the_table() -> None:
    """But for those of every run."""
    options = set(vars(arguments())) - {"default_of", "out", "report"}
    assert options == {option for read in bench.READ for option in read.options}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("given", [("--suite", "gpu"), ("--device", "cuda")])
def test_without_a_gpu_the_command_says_so(
    given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run(arguments(*given)) == 1
    assert "finds no NVIDIA GPU" in capsys.readouterr().err


def test_on_a_gpu_cases_run_in_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that fails is said, and those after it are measured all the same."""
    asked: list[tuple[str, int]] = []
    closed: list[bool] = []
    row = cases.measure(Case("score", "forward", shape=TINY), 1, str, ["plain torch"])

    class Worker:
        def measure(self, case: Case, rounds: int, *given: Any) -> dict[str, Any]:
            asked.append((case.what, rounds))
            if case.what == "kto":
                raise RuntimeError("round 1 of 15: its process died")
            return row

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(bench, "Worker", Worker)
    monkeypatch.setattr(bench.machine, "describe", lambda device: {})
    run = bench._Run(arguments("--device", "cuda"), "cuda")
    wanted = [(Case(what, "forward"), True) for what in ("dpo", "kto", "orpo")]
    run._measure(wanted, progress.Parts(3))
    assert asked == [("dpo", 15), ("kto", 15), ("orpo", 15)]
    assert run.report["cases"] == [row, row] and closed == [True]
    assert "kto, float32, forward: not measured, RuntimeError: round 1" in capsys.readouterr().out


def earlier(folder: Path, chip: str) -> None:
    report = {"machine": machine.describe("cpu") | {"chip": chip}, "checks": [{"lane": "old"}]}
    drive.write(folder / drive.REPORT, report)
    drive.write(folder / drive.LEFT, {"check torch: bf16": drive.NOT_BEGUN})


@pytest.mark.parametrize("same", [True, False])
def test_more_adds_to_a_report_of_the_same_machine(
    same: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chip = machine.describe("cpu")["chip"]
    earlier(tmp_path, chip if same else "another chip")
    row = {"lane": "torch", "case": "bf16", "passed": False, "reason": "far off"}

    class Run:
        def __init__(self, run: drive.Drive, *given: Any) -> None:
            self.drive = run

        def parts(self) -> list[drive.Part]:
            items = [
                drive.Item("check torch: bf16", lambda until: self.drive.add("checks", row, "")),
                drive.Item("check torch: fp32", lambda until: pytest.fail("was not left")),
            ]
            return [drive.Part(10, [items])]

    monkeypatch.setattr(gpu, "Run", Run)
    monkeypatch.setattr(gpu, "passed", lambda report: False)
    monkeypatch.setattr(bench.reporting, "terminal_summary", str)
    out = tmp_path / "out"
    given = ("--suite", "gpu", "--device", "cpu", "--more", str(tmp_path), "--out", str(out))
    # Counted from the start of this process, whose tests may have run for long.
    given += ("--seconds", "1e6")
    assert bench.run(arguments(*given)) == 1
    report, left = drive.earlier(out)
    assert left == {} and report["checks"] == [{"lane": "old"}] * same + [row]
    assert ("a report of its own" in capsys.readouterr().out) == (not same)
