# SPDX-License-Identifier: Apache-2.0
"""What would be measured on a GPU, and the table that ``auto`` reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpref.bench import choice as bench_choice
from fastpref.bench import gpu
from fastpref.bench.experiment import MODES, Case
from fastpref.bench.suites import SUITES
from fastpref.bench.work import Shape
from fastpref.scoring.backends import choice


def test_the_cases_are_cases() -> None:
    cases = list(gpu.cases())
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert case.mode in SUITES[case.what].modes and case.device == "cuda"
        assert case.shape.scored == 8192
    assert {case.what for case in cases} == set(SUITES)
    assert {case.mode for case in cases if case.what == "score"} == set(MODES)
    assert {case.logits for case in cases} == {"trained", "random"}
    assert [case.shape.scored for case in gpu.memory_cases()] == list(gpu.TOKENS)


def test_the_table_of_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured is what the choice reads."""
    shape = Shape(4, 40, 16, 300, masked=0)
    case = Case("score", "frozen head", "bfloat16", shape)
    entry = bench_choice.entry(case, 90, 2, lambda text: None)
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
    cases = list(bench_choice.cases("cuda"))
    assert {case.shape.positions for case in cases} == set(bench_choice.ROWS)
    assert {case.dtype for case in cases} == set(bench_choice.DTYPES)
    names = [one.name for one in SUITES["score"].experiment(_tiny(cases[0])).candidates]
    assert {f"fastpref, {one} backend" for one in bench_choice.BACKENDS} & set(names)


def _tiny(case: Case) -> Case:
    return replace(case, shape=Shape(4, 8, 8, 50), device="cpu")
