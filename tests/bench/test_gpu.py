# SPDX-License-Identifier: Apache-2.0
"""The GPU suite's bookkeeping, on CPU tensors."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastpref.bench import choice as bench_choice
from fastpref.bench import gpu
from fastpref.bench.implementations import Implementation, implementations
from fastpref.bench.work import Shape, make_work
from fastpref.cli import bench
from fastpref.scoring.backends import choice
from tests.cli.test_bench import arguments

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(4, 40, 16, 300, masked=0)


def some() -> Iterator[Implementation]:
    yield next(one for one in implementations() if one.name == "plain torch")
    yield Implementation("absent", lambda *_: torch.zeros(()), "not here")

    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nand more")

    yield Implementation("failing", fails)


def test_every_case_has_its_rows_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "candidates", some)
    said: list[str] = []
    report = gpu.suite((SHAPE,), "cpu", 3, said.append)
    assert [row["case"] for row in report] == ["no grad", "frozen head", "trainable head"]
    for row in report:
        assert set(row["timings"]) == {"bare products", "plain torch"}
        assert row["timings"]["bare products"]["ratio"] == 1
        assert row["skipped"] == {
            "absent": "not here",
            "failing": "RuntimeError: no kernel image",
        }
        error = row["timings"]["plain torch"]["error"]
        assert error is None if row["case"] == "no grad" else 1e-4 < error < 2e-2
    assert any("failing: not measured, RuntimeError" in line for line in said)


def test_the_checked_gradient_is_that_of_all_rows() -> None:
    work = make_work(SHAPE, torch.float64)
    plain = next(some())
    whole = gpu.step(plain, work, "frozen head")
    assert whole is not None
    last = whole.flatten(0, 1)[-gpu.CHECKED_ROWS :]
    # Plain torch rounds its log-softmax to float32.
    torch.testing.assert_close(gpu.exact_gradient(work), last, rtol=1e-4, atol=1e-6)


def test_bare_products_are_as_many_as_the_case_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    work = make_work(SHAPE, torch.float32)
    flops: list[int] = []
    product = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        flops.append(a.shape[0] * a.shape[1] * b.shape[1])
        return product(a, b)

    monkeypatch.setattr(torch, "mm", counted)
    for case, units in gpu.UNITS.items():
        flops.clear()
        gpu.bare_products(work, case)
        assert flops == [160 * 16 * 300] * units


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(arguments(suite="gpu")) == 1
    assert "--suite gpu: torch" in capsys.readouterr().err


def test_the_table_of_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured is what the choice reads."""
    entries = bench_choice.measure(iter([("bfloat16", SHAPE)]), 90, "cpu", 2, lambda line: None)
    assert [list(one["milliseconds"]) for one in entries] == [["torch"]]
    file = tmp_path / "choice.json"
    file.write_text(json.dumps(entries))
    monkeypatch.setattr(choice, "TABLE", file)
    choice.measured.cache_clear()
    try:
        (entry,) = choice.measured()
    finally:
        choice.measured.cache_clear()
    assert entry.size == (torch.bfloat16, 160, 16, 300) and entry.capability == 90


def test_sizes_are_whole() -> None:
    for _, shape in bench_choice.sizes():
        assert shape.positions in bench_choice.ROWS


def test_the_table_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "candidates", some)
    cases = json.loads(json.dumps(gpu.suite((SHAPE,), "cpu", 1, lambda line: None)))
    cases[0]["timings"].pop("plain torch")
    cases[1]["timings"]["plain torch"] |= {"milliseconds": 12.34, "ratio": 1.234, "peak": 56.7}
    module = runpy.run_path(str(ROOT / "benchmarks" / "gpu_table.py"))
    lines = module["table"]({"machine": {"chip": "H200", "torch": "2.11"}, "cases": cases})
    first, _, head, rule, *rows = lines.splitlines()
    assert first.startswith("H200, bfloat16") and "torch 2.11" in first
    assert head.count("160, 16, 300: ") == 3 and rule == "|---|---|---|---|"
    assert [row.split(" | ")[0] for row in rows] == ["| bare products", "| plain torch"]
    assert rows[1].split(" | ")[1:3] == ["not measured", "12.3 ms, 1.23x, 57 MiB"]
