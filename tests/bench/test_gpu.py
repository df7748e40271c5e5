# SPDX-License-Identifier: Apache-2.0
"""What would be measured on a GPU."""

from __future__ import annotations

from fastpref.bench import gpu
from fastpref.bench.experiment import MODES
from fastpref.bench.suites import SUITES


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
