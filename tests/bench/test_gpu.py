# SPDX-License-Identifier: Apache-2.0
"""What would be measured on a GPU, and the table that ``auto`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.bench import cases, gpu, scorers
from fastpref.bench import choice as bench_choice
from fastpref.bench.experiment import MODES, Case
from fastpref.bench.suites import SUITES
from fastpref.bench.work import Shape
from fastpref.scoring.backends import choice


def test_the_cases_are_cases() -> None:
    found = [case for case, _ in gpu.cases()]
    # Those that compile come early, or their peers are not measured at all.
    assert [compiles for _, compiles in gpu.cases()][:2] == [True, True]
    assert len(set(found)) == len(found)
    for case in found:
        assert case.mode in SUITES[case.what].modes and case.device == "cuda"
        assert case.shape.scored == 8192
    assert {case.what for case in found} == set(SUITES)
    assert {case.mode for case in found if case.what == "score"} == set(MODES)
    assert {case.logits for case in found} == {"trained", "random"}
    assert [case.shape.scored for case in gpu.memory_cases()] == list(gpu.TOKENS)


def test_the_table_of_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured is what the choice reads."""
    shape = Shape(4, 40, 16, 300, masked=0)
    case = Case("score", "frozen head", "bfloat16", shape)
    measured: list[set[str]] = []

    def measure(*given: Any, only: Any) -> dict[str, Any]:
        measured.append(set(only))
        return cases.measure(*given, only=only)

    monkeypatch.setattr(bench_choice, "measure", measure)
    entry = bench_choice.entry(case, 90, 2, lambda text: None)
    assert measured == [{f"fastpref, {one} backend" for one in ("triton", "cuda", "torch")}]
    assert list(entry["milliseconds"]) == ["torch"]
    file = tmp_path / "choice.json"
    file.write_text(json.dumps([entry]))
    monkeypatch.setattr(choice, "TABLE", file)
    choice.measured.cache_clear()
    try:
        (found,) = choice.measured()
    finally:
        choice.measured.cache_clear()
    assert found.size == (torch.bfloat16, 160, 16, 300) and found.capability == 90


def test_choices_are_of_all_backends_and_whole_sizes() -> None:
    found = list(bench_choice.cases("cuda"))
    assert {case.shape.positions for case in found} == set(bench_choice.ROWS)
    assert {case.dtype for case in found} == set(bench_choice.DTYPES)
    names = {one.name for one in scorers.own(found[0])}
    assert {f"fastpref, {one} backend" for one in bench_choice.BACKENDS} <= names
