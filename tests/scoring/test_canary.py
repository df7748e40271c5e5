# SPDX-License-Identifier: Apache-2.0
"""Kernels that a verdict chose are watched in their first calls, and found out where wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpref import ScoringOptions, linear_logprob, preference_loss
from fastpref.scoring import backends, canary
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.backends.tiled import Tiled
from tests.scoring.cases import Case, make_case

LOUD = "python -m fastpref tune --forget.*backend='rows'"


class Wrong:
    """The torch backend under the name of the fused one, ``off`` added to every sum of a row."""

    off = 0.0
    rows: slice = slice(None)

    def exp_rows(self, *arguments: Any) -> Any:
        sums = torch_backend.exp_rows(*arguments)
        sums.sum[self.rows] += self.off * (1 + sums.sum[self.rows])
        return sums

    def __getattr__(self, name: str) -> Any:
        return getattr(torch_backend, name)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Wrong:
    """``auto`` takes the fused kernels, as by a verdict, and these are them."""
    made = Wrong()
    load = backends.load
    monkeypatch.setattr(canary, "WATCH", canary.Watch())
    monkeypatch.setattr(backends, "choose", lambda name, *_: "triton" if name == "auto" else name)
    monkeypatch.setattr(
        backends, "load", lambda name: Tiled(made) if name == "triton" else load(name)
    )
    return made


def score(case: Case, backend: str = "auto", **options: Any) -> None:
    linear_logprob(
        case.hidden,
        case.weight,
        case.target,
        bias=case.bias,
        options=ScoringOptions(backend=backend, **options),  # type: ignore[arg-type]
        **case.map,
    )


CASES = {
    "plain": make_case(dtype=torch.bfloat16),
    "half": make_case(dtype=torch.float16, rows=3),
    "everything": make_case(
        dtype=torch.bfloat16, bias=True, softcap=5.0, temperature=1.5, ignored=0.3
    ),
    "overflow": make_case(dtype=torch.bfloat16, below=0.5, bias=True),
    "single": make_case(dtype=torch.float32),
}


@pytest.mark.parametrize("slab", [canary.SLAB, 7 * 500])
@pytest.mark.parametrize("name", CASES)
def test_right_kernels_pass(
    kernels: Wrong, monkeypatch: pytest.MonkeyPatch, name: str, slab: int
) -> None:
    monkeypatch.setattr(canary, "SLAB", slab)
    for _ in range(3):
        score(CASES[name])
    assert canary.WATCH.calls.total() == 3
    (last,) = canary.WATCH.pending
    assert 0 < float(last.excess) < 0.5


@pytest.mark.heavy
@pytest.mark.skipif(
    backends.unavailable_reason("triton", "cpu") is not None, reason="Triton's interpreter is off"
)
def test_the_fused_kernels_pass_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "WATCH", canary.Watch())
    monkeypatch.setattr(backends, "choose", lambda *_: "triton")
    case = make_case(dtype=torch.float16, rows=70, hidden=16, vocab=300, bias=True)
    for _ in range(2):
        score(case)
    (last,) = canary.WATCH.pending
    # Their logits are not rounded to 16 bits.
    assert 0 < float(last.excess) < 0.01


@pytest.mark.parametrize("off", [1.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", CASES)
def test_wrong_kernels_are_found_out_at_the_next_call(
    kernels: Wrong, name: str, off: float
) -> None:
    kernels.off = off
    score(CASES[name])
    kernels.off = 0.0
    for _ in range(2):  # and at every one after it
        with pytest.raises(RuntimeError, match=LOUD):
            score(CASES[name])


def test_the_rows_are_spread_over_the_call(kernels: Wrong) -> None:
    kernels.off, kernels.rows = 1.0, slice(130, None)  # of 140
    score(CASES["plain"])
    with pytest.raises(RuntimeError, match=LOUD):
        score(CASES["plain"])


def test_only_the_first_calls_are_watched(kernels: Wrong) -> None:
    for _ in range(canary.CALLS + 2):
        score(CASES["plain"])
    assert set(canary.WATCH.calls.values()) == {canary.CALLS}
    assert not canary.WATCH.pending
    kernels.off = 1.0
    score(CASES["plain"])
    score(CASES["plain"])
    with pytest.raises(RuntimeError, match=LOUD):  # other kernels, other calls
        for _ in range(2):
            score(CASES["half"])


def test_what_a_user_named_is_not_watched(kernels: Wrong) -> None:
    kernels.off = 1.0
    for backend in ("triton", "torch"):
        score(CASES["plain"], backend)
    assert not canary.WATCH.calls


def test_batches_are_watched(kernels: Wrong) -> None:
    kernels.off = 1.0
    hidden = torch.randn(4, 40, 8, requires_grad=True)
    weight = torch.randn(300, 8, requires_grad=True)
    target = torch.randint(300, (4, 40))
    with pytest.raises(RuntimeError, match=LOUD):
        preference_loss(
            hidden,
            weight,
            target,
            "cpo",
            options=ScoringOptions(schedule="batches", memory_budget=300 * 4 * 130),
        )


def test_rows_without_a_finite_score_are_not_compared(kernels: Wrong) -> None:
    case = make_case(dtype=torch.bfloat16, rows=6, bias=True)
    case.hidden[0] = torch.nan
    case.hidden[1] = torch.inf
    case.target[2] = 99999
    case.bias[case.target[3]] = -torch.inf
    for _ in range(2):
        score(case)
    make_case.cache_clear()


def test_a_result_is_read_when_it_has_arrived(kernels: Wrong) -> None:
    """Not before: the host would wait for the device."""

    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    kernels.off = 1.0
    score(CASES["plain"])
    (check,) = canary.WATCH.pending
    event = Event()
    canary.WATCH.pending[0] = check._replace(arrived=event)
    score(CASES["plain"])
    event.done = True
    with pytest.raises(RuntimeError, match=LOUD):
        score(CASES["plain"])


def test_nothing_happens_under_capture(kernels: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.off = 1.0
    score(CASES["plain"])
    with monkeypatch.context() as patch:
        patch.setattr(canary, "_capturing", lambda rows: True)
        score(CASES["plain"])
    assert canary.WATCH.calls.total() == 1


def test_want_of_memory_for_the_check_costs_nothing(
    kernels: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("not a byte")

    monkeypatch.setattr(canary, "_check", fail)
    score(CASES["plain"])
    assert not canary.WATCH.pending
