# SPDX-License-Identifier: Apache-2.0
"""The same results in a terminal, as CSV, Markdown and pictures, drawn again from their JSON."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastpref.bench import pictures
from fastpref.bench import report as reporting
from fastpref.bench.cases import LIMIT
from fastpref.bench.lanes import ON_CUDA
from fastpref.bench.losses import OVERFLOWING
from fastpref.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def timing(ratio: float, error: float | None, peak: float | None = None) -> dict[str, Any]:
    return {
        "seconds": ratio / 10,
        "ratio": ratio,
        "low": ratio - 0.1,
        "high": ratio + 0.1,
        "error": error,
        "peak": peak,
    }


def case(what: str, mode: str, timings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "what": what,
        "mode": mode,
        "dtype": "float32",
        "shape": {
            "sequences": 8,
            "length": 256,
            "hidden_size": 64,
            "vocab_size": 500,
            "masked": 0.25,
        },
        "logits": "trained",
        "entropy": 2.04,
        "device": "cpu",
        "timings": {LIMIT: timing(1.0, None)} | timings,
        "skipped": {"Liger": "liger_kernel is not installed"},
    } | changes


@pytest.fixture
def report() -> dict[str, Any]:
    own = {"fastpref": timing(1.25, 1e-6)}
    plain = {"plain torch": timing(4.0, 2e-6)}
    late = {"fastpref, recompute": timing(1.5, 1e-6)}
    overflowing = {OVERFLOWING: timing(1.5, 1e-6)}
    heads = {
        name: timing(ratio, 1e-8)
        for name, ratio in (("dpo", 0.004), ("ipo", 0.002), ("tpo", 0.03), ("kto", 0.001))
    }
    memory = [
        {
            "implementation": name,
            "dtype": "float32",
            "device": "cpu",
            "scored": scored,
            "hidden_size": 64,
            "vocab_size": 500,
            "peak": peak,
            "gradients": 30.0,
            "workspace": 50.0 if name == "fastpref" else None,
            "logits": scored / 8,
        }
        for scored in (2048, 4096)
        for name, peak in (("fastpref", 42.0), ("plain torch", scored / 2))
    ]
    curve = [
        {
            "size": size,
            "seconds": size / 100,
            "products": size / 200,
            "workspace": 7.0,
            "rows": 2.0 * size,
            "logits": 32.0 * size,
        }
        for size in (1, 2, 8)
    ]
    return {
        "machine": {"chip": "a chip", "threads": 2, "torch": "2.13.0", "trl": "not installed"},
        "cases": [
            case("score", "forward", own | plain),
            case("score", "trainable head", own | overflowing | plain | late),
            case("divergence", "trainable head", own | plain),
            case("heads", "trainable head", heads),
        ],
        "memory": memory,
        "curves": {"N": curve},
    }


def test_terminal(report: dict[str, Any]) -> None:
    said = reporting.terminal(report)
    assert "a chip, 2 threads, torch 2.13.0, trl not installed" in said
    assert "linear_logprob and DPO on given references: float32, trainable head" in said
    assert said.count("(N=1536 of 2048, H=64, V=500, 2.0 nats a token)") == 4
    assert "125.0ms   1.25x   1.15x   1.35x   1.0e-06" in said
    assert "1% overflowing rows cost 1.20x" in said
    assert said.count("Liger: not measured, liger_kernel is not installed") == 4
    assert "100us   0.10%" in said
    assert "peak MiB" not in said
    assert "trainable head, float32, H=64, V=500 (MiB)" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("  plain torch   ")]
    assert ["plain", "torch", "4096", "2048", "30", "512"] in rows
    assert "time grows with N to the power of: fastpref 1.00, products 1.00" in said
    assert "with a budget of 64 MiB, to which a few (N, H) copies of rows are added: " in said
    assert ": workspace 7 to 7 MiB, (N, H) 2 to 16 MiB, (N, V) 32 to 256 MiB" in said
    assert "10.0ms       5.0ms       2.00x           7           2          32" in said


def test_terminal_shows_peaks_where_there_are_some() -> None:
    one = case("score", "forward", {"fastpref": timing(1.2, 1e-6, 321.4)}, device="cuda")
    one["timings"][LIMIT]["peak"] = 100.0
    said = reporting.terminal_case(one)
    assert "peak MiB" in said
    assert [line.split()[-1] for line in said.splitlines()[3:5]] == ["100", "321"]
    assert "120.0ms, 1.20x, 321 MiB" in reporting.markdown({"cases": [one]})


def test_one_size_shows_no_growth() -> None:
    sizes = dict.fromkeys(("seconds", "products", "workspace", "rows", "logits"), 1.0)
    rows = [{"size": 4} | sizes]
    assert "no growth" in reporting.terminal_curve("V", rows)


def test_comma_separated(report: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(reporting.comma_separated(report))))
    assert tuple(rows[0]) == reporting.COLUMNS
    assert len(rows) == sum(len(case["timings"]) for case in report["cases"])
    own = [row for row in rows if row["implementation"] == "plain torch"]
    assert [(row["what"], row["mode"]) for row in own] == [
        ("score", "forward"),
        ("score", "trainable head"),
        ("divergence", "trainable head"),
    ]
    assert float(own[0]["ratio"]) == 4.0 and float(own[0]["error"]) == 2e-6
    assert own[0]["scored"] == "1536" and own[0]["vocab_size"] == "500" and own[0]["peak"] == ""


def test_a_denoising_loss_is_set_beside_a_network_s_step() -> None:
    """At 1.25x of 2 products of 500 columns each element of a latent costs 2500 operations, of
    195.9 million. A forward alone is no step, and other cases have no latents."""
    own = {"fastpref": timing(1.25, 1e-6)}
    said = case("denoising", "frozen head", own)
    wanted = "in a step of a U-Net on these latents: 0.0013% of Stable Diffusion 1.5, 0.0006% of"
    assert wanted in reporting.terminal_case(said)
    others = [case("denoising", "forward", own), case("dpo", "frozen head", own)]
    others.append(case("denoising", "frozen head", {"plain torch": timing(2.0, 1e-6)}))
    for one in others:
        assert "U-Net" not in reporting.terminal_case(one)
    table = reporting.markdown({"cases": [others[0], said]})
    assert table.count("U-Net") == 1
    assert table.splitlines()[-1].startswith("float32, frozen head: fastpref's loss")


def test_markdown(report: dict[str, Any]) -> None:
    said = reporting.markdown(report)
    score, divergence, heads = said.split("\n\n**")
    assert score.startswith("**linear_logprob and DPO on given references** (N=1536 of 2048")
    assert "| | float32, forward | float32, trainable head |" in score
    assert "| plain torch | 4.00x | 4.00x |" in score and LIMIT not in said
    assert f"| {OVERFLOWING} |  | 1.50x |" in score and OVERFLOWING not in divergence
    names = [line.split(" | ")[0] for line in score.splitlines()[4:]]
    assert names == [
        "| fastpref",
        f"| {OVERFLOWING}",
        "| fastpref, recompute",
        "| plain torch",
    ]
    # Of dozens of objectives three.
    assert [line for line in heads.splitlines() if "%" in line] == [
        "| fastest | 0.10% |",
        "| median | 0.20% |",
        "| slowest | 3.00% |",
    ]


def test_what_was_asked_for_and_failed_is_not_measured(report: dict[str, Any]) -> None:
    report["cases"][0]["timings"].pop("plain torch")
    report["cases"][0]["skipped"]["plain torch"] = "RuntimeError: out of memory"
    assert "| plain torch | not measured | 4.00x |" in reporting.markdown(report)


def test_cases_of_other_sizes_have_tables_of_their_own(report: dict[str, Any]) -> None:
    first = report["cases"][0]
    wider = first | {"shape": first["shape"] | {"hidden_size": 128}}
    random = first | {"logits": "random"}
    shorter = first | {"shape": first["shape"] | {"length": 64}}
    found = {"cases": [first, wider, random, shorter, report["cases"][1]]}
    assert [(name, len(cases)) for name, cases in reporting.groups(found)] == [
        ("score-1536x64x500-trained", 2),
        ("score-1536x128x500-trained", 1),
        ("score-1536x64x500-random", 1),
        ("score-384x64x500-trained", 1),
    ]


@pytest.mark.heavy
def test_pictures(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = pictures.draw(report, tmp_path / "new")
    assert [path.name for path in written] == [
        "score-1536x64x500-trained-time.png",
        "score-1536x64x500-trained-error.png",
        "divergence-1536x64x500-trained-time.png",
        "divergence-1536x64x500-trained-error.png",
        "heads-1536x64x500-trained-time.png",
        "heads-1536x64x500-trained-error.png",
        "memory.png",
        "overview.png",
        "growth.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_bars_hold_what_was_measured(report: dict[str, Any]) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    (_, cases), *_ = reporting.groups(report)
    figure = pictures._bars(plt, report, cases, "ratio", "time")
    forward, trainable = figure.axes
    assert [bar.get_width() for bar in trainable.patches] == [4.0, 1.5, 1.5, 1.25]
    assert [bar.get_width() for bar in forward.patches] == [4.0, 0.0, 0.0, 1.25]
    assert [one.get_text() for one in forward.texts] == ["4.00x", "not run", "not run", "1.25x"]
    plt.close(figure)


def test_dots_hold_the_errors_and_a_line_what_is_allowed(report: dict[str, Any]) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    (_, cases), *_ = reporting.groups(report)
    figure = pictures._bars(plt, report, cases, "error", "error")
    for panel, case in zip(figure.axes, cases, strict=True):
        errors = [one["error"] for one in case["timings"].values() if one["error"]]
        (dots,) = panel.collections
        shown = dots.get_offsets()[:, 0].compressed().tolist()
        assert sorted(shown) == sorted(errors)
        plain = case["timings"].get("plain torch", {}).get("error")
        lines = [line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == "--"]
        assert lines == ([2 * plain] if plain else [])
    plt.close(figure)


@pytest.mark.heavy
def test_pictures_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the page: no label of an axis lies on another, every line has its name, and the
    title says what is better and on what it ran."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **given: drawn.append(self))
    script = readme_script()
    for result in script.load().values():
        pictures.draw(script.shown(result), tmp_path)
    assert drawn
    for figure in drawn:
        figure.draw_without_rendering()
        titles = [figure.get_suptitle(), *(panel.get_title() for panel in figure.axes)]
        assert "Lower is better" in " ".join(titles) and "threads" in " ".join(titles)
        for panel in figure.axes:
            for axis in (panel.xaxis, panel.yaxis):
                shown = [one for one in axis.get_ticklabels() if one.get_text()]
                shown = [one for one in shown if one.get_visible()]
                boxes = [one.get_window_extent() for one in shown]
                turned = any(one.get_rotation() % 90 for one in shown)
                pairs = [] if turned else list(itertools.pairwise(boxes))
                assert not any(first.overlaps(second) for first, second in pairs), titles
            named = {one.get_label() for one in panel.get_lines()}
            legend = panel.get_legend()
            entries = {one.get_text() for one in legend.get_texts()} if legend else set()
            assert {name for name in named if not name.startswith("_")} == entries


@pytest.mark.heavy
def test_redrawn_from_a_file(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    assert main(["bench", "--report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert reporting.terminal(report) in capsys.readouterr().out
    assert (tmp_path / "out" / "bench.csv").read_text() == reporting.comma_separated(report)
    assert (tmp_path / "out" / "bench.md").read_text() == reporting.markdown(report) + "\n"


def test_redrawn_with_nothing_but_curves(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({key: report[key] for key in ("machine", "curves")}))
    assert main(["bench", "--report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "time grows with N" in capsys.readouterr().out
    assert not (tmp_path / "out" / "bench.csv").exists()


def test_overflowing_rows_alone(report: dict[str, Any]) -> None:
    report["cases"][1]["timings"].pop("fastpref")
    assert "1% overflowing rows cost" not in reporting.terminal(report)


def test_a_case_without_entropy(report: dict[str, Any]) -> None:
    assert "V=500)" in reporting.terminal_case(report["cases"][3] | {"entropy": None})


@pytest.mark.parametrize("spoiled", ["logits", "timings", "shape"])
def test_a_report_that_is_damaged(
    spoiled: str, report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report["cases"][0].pop(spoiled)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    assert main(["bench", "--report", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"KeyError: '{spoiled}'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", "[]", '{"machine": {}}'])
def test_a_file_that_is_none(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", "--report", str(path)]) == 2
    assert "--report must be a file that --out wrote" in capsys.readouterr().err


def readme_script() -> Any:
    path = ROOT / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_section_of_the_readme(report: dict[str, Any]) -> None:
    script = readme_script()
    inside = script.section({"a/b.json": report}, {"a/b.json": ["a/b/memory.png"]})
    assert inside.startswith("[b.json](a/b.json): a chip, 2 threads, torch 2.13.0")
    assert reporting.markdown(report) in inside and "![memory](a/b/memory.png)" in inside
    assert reporting.markdown_curves(report) in inside
    text = f"before\n{script.START}\nold\n{script.END}\nafter"
    found = script.with_section(text, inside)
    assert found.startswith("before\n") and found.endswith("\nafter") and "old" not in found
    assert script.with_section(found, inside) == found
    with pytest.raises(ValueError, match="once each"):
        script.with_section("no marks", "tables")


def test_the_readme_shows_the_results() -> None:
    script = readme_script()
    results = script.load()
    if not results:
        pytest.skip("no results beside this copy of the tests")
    text = script.README.read_text(encoding="utf-8")
    folders = {path: (ROOT / path).with_suffix("") for path in results}
    drawn = {
        path: [f"{folder.relative_to(ROOT).as_posix()}/{name}" for name in _shown(text, folder)]
        for path, folder in folders.items()
    }
    assert all((ROOT / one).exists() for paths in drawn.values() for one in paths)
    for path, result in results.items():
        pictured = [one for one in ("cases", "memory", "curves") if script.shown(result).get(one)]
        assert bool(drawn[path]) == bool(pictured)
    assert script.section(results, drawn) in text


def _shown(text: str, folder: Path) -> list[str]:
    """The pictures of ``folder`` that the text shows, in its order."""
    ends = {f"{folder.name}/{path.name})": path.name for path in folder.glob("*.png")}
    return [ends[end] for end in sorted(filter(text.__contains__, ends), key=text.index)]


def of_gpu() -> dict[str, Any]:
    """What ``make gpu`` might have written before it was cut short."""
    row = {"lane": "rows", "case": "bf16", "passed": True, "seconds": 0.1, "reason": None}
    bound = {"share": 0.4, "worst": "d hidden", "error": 1e-3}
    shape = {
        "sequences": 8,
        "length": 1024,
        "hidden_size": 4096,
        "vocab_size": 128256,
        "masked": 0.0,
    }
    given = {"dtype": "bfloat16", "device": "cuda", "shape": shape, "warnings": ["it fell back"]}
    timings = {
        LIMIT: timing(1.0, None, 2004.0),
        "fastpref, rows": timing(1.07, 1e-3, 2100.0),
        "TRL fused head": timing(1.5, 1e-3, 900.0),
    }
    return {
        "machine": {"chip": "a GPU", "driver": "580", "torch": "2.11.0"},
        "unavailable": {"fused": "triton is not installed"},
        "checks": [
            row | bound,
            row | bound | {"case": "fp32", "passed": False, "share": 7.5},
            row | {"lane": "cuda", "passed": False, "reason": "its process died"},
            row | {"lane": "cuda", "passed": None, "reason": "too little memory"},
        ],
        "cases": [case("head", "trainable head", timings, **given)],
        "tests": [
            {
                "tests": "scoring",
                "finished": False,
                "passed": 3,
                "failed": ["test_a"],
                "skipped": 2,
                "exit": None,
            }
        ],
        "failed": {"time call": "MemoryError: too large"},
    }


def test_a_report_of_a_gpu() -> None:
    said = reporting.terminal(of_gpu())
    for line in (
        r"  rows: bf16 +ok +0.40 of its bound \(d hidden\)",
        r"  rows: fp32 +WRONG +7.50 of its bound \(d hidden\)",
        r"  cuda: bf16 +WRONG +its process died",
        r"  cuda: bf16 +not seen +too little memory",
        r"  fastpref warned: it fell back",
        r"  tests of scoring: 3 passed, 1 failed, 2 skipped, cut short\n    test_a",
        r"fastpref, rows: 1 of 2 checks passed; wrong: fp32",
        r"fastpref, cuda: 0 of 1 checks passed; wrong: bf16",
        r"fastpref, fused: not available: triton is not installed",
        r"time call: failed: MemoryError: too large",
    ):
        assert re.search(f"^{line}$", said, re.MULTILINE), line


def test_the_readme_says_what_is_measured_and_what_is_predicted() -> None:
    script = readme_script()
    shared = {"what": "head", "hidden_size": 4096, "vocab_size": 128256}
    predictions = [
        shared
        | {"implementation": "fastpref, rows", "mode": mode, "predicted": "1.05", "target": target}
        for mode, target in (("trainable head", 1.05), ("forward", None))
    ]
    nothing = script.gpu_section({}, predictions)
    call = script.gpu_section({}, [predictions[0] | {"what": "call"}])
    assert (
        call.splitlines()[2] == "| fastpref, rows, TRL's call: trainable head | 1.05 | 1.05 | no |"
    )
    assert nothing.splitlines()[2:] == [
        "| fastpref, rows: trainable head | 1.05 | 1.05 | no |",
        "| fastpref, rows: forward | 1.05 |  | no |",
    ]
    found = script.gpu_section({"a/gpu.json": of_gpu()}, predictions)
    assert "| fastpref, rows: trainable head | 1.05 | 1.05 | 1.07 (a GPU) |" in found
    assert "| fastpref, rows: forward | 1.05 |  | no |" in found
    assert "[gpu.json](a/gpu.json): a GPU" in found
    assert "- fastpref, rows: 1 of 2 checks passed; wrong: fp32" in found
    assert "| TRL fused head | 150.0ms, 1.50x, 900 MiB |" in found
    assert script.of_gpu(of_gpu())


def test_the_gpu_section_of_the_readme_is_that_of_the_results() -> None:
    script = readme_script()
    text = script.README.read_text(encoding="utf-8")
    predictions = json.loads(script.PREDICTIONS.read_text())
    inside = script.gpu_section(script.load(gpu=True), predictions)
    assert script.with_section(text, inside, script.GPU_START, script.GPU_END) == text
    known = {case["implementation"] for case in predictions}
    assert known <= {f"fastpref, {lane.name}" for lane in ON_CUDA}
