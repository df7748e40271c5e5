# SPDX-License-Identifier: Apache-2.0
"""The verdict, of tiers that are right, wrong, fast, slow, or take their process down."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from fastpref import isolation
from fastpref.bench.timing import Timing
from fastpref.isolation import Isolated, Lost, Say
from fastpref.scoring.backends.verdict_files import Verdict
from fastpref.tuning import checks, child, timings
from fastpref.tuning.checks import CHECKS, Error
from fastpref.tuning.child import Answer, CheckRequest, TimeRequest
from fastpref.tuning.judge import MARGIN, Undecided, judge
from fastpref.tuning.timings import MODES
from tests.tuning.settings import SETTING, TIERS, shrink

HERE = ("rows", "triton")  # what stands for them is below
FINE = Error("logp, largest", 0.5, 1.0)


def quietly(text: str) -> None:
    return None


class Script:
    """Answers as told: ``speed`` by tier, and ``trouble`` of (tier, case or mode)."""

    def __init__(
        self, trouble: dict[tuple[str, str], object] | None = None, **speed: float
    ) -> None:
        self.trouble, self.speed = trouble or {}, {"rows": 1.0, "triton": 0.5} | speed
        self.asked: list[tuple[str, ...]] = []
        self.closed = 0

    def ask(self, request: object, progress: Say) -> Answer:
        if isinstance(request, CheckRequest):
            self.asked.append((request.tier, request.name))
            return Answer(self._meet(request.tier, request.name) or FINE, 100)
        assert isinstance(request, TimeRequest)
        name = f"{request.mode}{' heavy' * request.heavy}"
        self.asked.append((*request.tiers, name))
        found = {}
        for tier in request.tiers:
            progress(tier)
            slower = self._meet(tier, name) or 1.0
            found[tier] = self._timing(self.speed[tier] * slower, request.tiers[0])
        return Answer(found, 200)

    def _meet(self, tier: str, name: str) -> Any:
        met = self.trouble.get((tier, name))
        if isinstance(met, Exception):
            raise met
        return met

    def _timing(self, seconds: float, first: str) -> Timing:
        ratio = seconds / self.speed[first]
        return Timing(seconds, ratio, ratio, ratio)

    def close(self) -> None:
        self.closed += 1


def of(verdicts: tuple[Verdict, ...]) -> dict[bool, str]:
    return {one.heavy: one.tier for one in verdicts}


def test_right_and_faster() -> None:
    script = Script()
    found = judge(SETTING, HERE, script, quietly)
    assert found.left == HERE and found.peak == 200 and not found.left_out
    assert of(found.verdicts) == {False: "triton", True: "triton"}
    one = found.verdicts[0]
    assert one.subject == ("bfloat16", False, 16, 300) == found.subjects[0]
    assert one.milliseconds == {mode: {"rows": 1000.0, "triton": 500.0} for mode in MODES}
    checked = [(tier, name) for name in CHECKS for tier in HERE]
    timed = [(*HERE, f"{mode}{' heavy' * heavy}") for heavy in (False, True) for mode in MODES]
    assert script.asked == [*checked, *timed]


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (1 / MARGIN - 1e-9, "triton"),
        (1 / MARGIN + 1e-9, "rows"),
        (1.0, "rows"),
        (2.0, "rows"),
        (float("nan"), "rows"),
    ],
)
def test_by_how_much_it_must_be_faster(seconds: float, expected: str) -> None:
    found = judge(SETTING, HERE, Script(triton=seconds), quietly)
    assert of(found.verdicts) == {False: expected, True: expected}


@pytest.mark.parametrize("mode", MODES)
def test_it_must_be_faster_in_everything(mode: str) -> None:
    slower = {("triton", f"{mode} heavy"): 2.0}
    found = judge(SETTING, HERE, Script(slower), quietly)
    assert of(found.verdicts) == {False: "triton", True: "rows"}


@pytest.mark.parametrize(
    "error", [Error("d weight, rms", 2.0, 1.0), Error("logp", float("nan"), 1.0)]
)
@pytest.mark.parametrize("tier, other", [("triton", "rows"), ("rows", "triton")])
def test_a_wrong_tier_is_left_out(tier: str, other: str, error: Error) -> None:
    script = Script({(tier, "kept"): error})
    found = judge(SETTING, HERE, script, quietly)
    assert found.left == (other,) and of(found.verdicts) == {False: other, True: other}
    assert found.left_out == {tier: f"wrong {error}"} and found.failed_in == {tier: "kept"}
    assert script.closed == 1
    later = list(CHECKS)[list(CHECKS).index("kept") + 1 :]
    assert not any(asked in script.asked for asked in [(tier, name) for name in later])
    assert (other, next(iter(MODES))) in script.asked


@pytest.mark.parametrize("where", ["plain", "3u, trainable", "1u, scores heavy"])
def test_a_tier_that_is_lost_is_left_out(where: str) -> None:
    script = Script({("triton", where): Lost("triton", "its process died\nand more")})
    found = judge(SETTING, HERE, script, quietly)
    assert of(found.verdicts) == {False: "rows", True: "rows"}
    assert found.left_out == {"triton": "its process died"}
    assert found.failed_in["triton"].split()[0] == where.split()[0]
    # Nothing that was timed beside it stays.
    assert all(set(row) == {"rows"} for times in found.times.values() for row in times.values())
    assert all(len(times) == len(MODES) for times in found.times.values())


def test_no_tier_is_left() -> None:
    for where in ("plain", "3u, trainable"):
        trouble = {(tier, where): Lost(tier, "ImportError: gone") for tier in HERE}
        found = judge(SETTING, HERE, Script(trouble), quietly)
        assert found.left == () and found.verdicts == () and found.times == {}
        assert len(found.subjects) == 2


def test_want_of_memory_is_no_fault_of_a_tiers() -> None:
    lost = Lost("triton", "OutOfMemoryError: CUDA out of memory. Tried ...")
    for where in ("kept", "2u, frozen head"):
        with pytest.raises(Undecided, match=r"ran out of memory in .* of triton: free it"):
            judge(SETTING, HERE, Script({("triton", where): lost}), quietly)


def test_it_says_what_runs() -> None:
    said: list[str] = []
    judge(SETTING, HERE, Script(), said.append)
    assert "plain, rows" in said and "3u, trainable, with statistics" in said


class InProcess:
    """What the process does, without one."""

    def ask(self, request: Any, progress: Say) -> Answer:
        try:
            return child.answer(request, progress)
        except Exception as error:
            raise Lost("", f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        pass


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        shrink(patch)
        yield
    checks._expected.cache_clear()


@pytest.mark.heavy
def test_of_real_tiers(small: None) -> None:
    found = judge(SETTING, (*TIERS, "cuda"), InProcess(), quietly)
    assert found.left == TIERS
    assert found.left_out["cuda"].startswith("ValueError: backend='cuda' is not available")
    assert {tuple(errors) for errors in found.errors.values()} == {TIERS}
    assert {one.tier for one in found.verdicts} <= set(TIERS)


@pytest.mark.heavy
def test_a_slower_real_tier(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step, slow = timings._step, [TIERS[0]]

    def slowed(tier: str, *given: Any) -> None:
        time.sleep(0.05 if tier in slow else 0.0)
        # The same kernels, so that nothing else differs.
        step("torch", *given)

    monkeypatch.setattr(timings, "_step", slowed)
    for expected in (TIERS[-1], TIERS[0]):
        verdicts = judge(SETTING, TIERS, InProcess(), quietly).verdicts
        assert of(verdicts) == {False: expected, True: expected}
        slow[0] = expected


def troubled(connection: Connection) -> None:
    """In the process: the torch tier under other names, which die, hang or are wrong."""

    def answer(request: Any, say: Say) -> Answer:
        if isinstance(request, TimeRequest):
            for tier in request.tiers:
                say(tier)
                if tier == "dies late":
                    os._exit(3)
            return Answer({tier: Timing(1.0, 1.0, 1.0, 1.0) for tier in request.tiers}, 0)
        if request.tier == "dies" and request.name == "statistics":
            os._exit(3)
        if request.tier == "hangs" and request.name == "kept":
            time.sleep(60)
        return Answer(FINE, 0)

    isolation.serve(connection, answer)


@pytest.mark.slow
@pytest.mark.heavy
def test_tiers_that_take_their_process_down() -> None:
    tiers = ("dies", "works", "hangs", "dies late")
    runner = Isolated(troubled, patience=5)
    try:
        found = judge(SETTING, tiers, runner, quietly)
    finally:
        runner.close()
    assert found.left_out == {
        "dies": "its process died",
        "hangs": "no answer for 5 s",
        "dies late": "its process died",
    }
    assert found.failed_in == {"dies": "statistics", "hangs": "kept", "dies late": "1u, scores"}
    assert of(found.verdicts) == {False: "works", True: "works"}


@pytest.mark.heavy
def test_the_process_answers_as_this_one(small: None) -> None:
    runner = Isolated(child.serve, patience=60)
    request = CheckRequest(SETTING, "1 row", "torch")
    try:
        answer = runner.ask(request, quietly)
    finally:
        runner.close()
    # At the true size of the case, there; the process knows of no smaller one.
    assert isinstance(answer, Answer) and answer.found.fine and answer.peak == 0
