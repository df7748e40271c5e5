# SPDX-License-Identifier: Apache-2.0
"""Right tiers pass every case, wrong ones are found out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.scoring import linear_logprob
from fastpref.scoring.backends import unavailable_reason
from fastpref.scoring.statistics import TokenScores
from fastpref.tuning import checks
from fastpref.tuning.checks import CHECKS, Error, Setting
from tests.tuning.settings import SETTING, TIERS, shrink


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        shrink(patch)
        yield
    checks._expected.cache_clear()


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_right_tiers_pass(name: str, tier: str, dtype: str) -> None:
    for width in (16, 23):
        found = checks.check(Setting("cpu", dtype, width, 300), name, tier)
        assert found.fine and found.error > 0, str(found)


@pytest.mark.heavy
@pytest.mark.skipif(
    unavailable_reason("triton", "cpu") is not None, reason="Triton's interpreter is off"
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if place % 3 == 0 else pytest.mark.slow)
        for place, name in enumerate(CHECKS)
    ],
)
def test_the_fused_kernels_pass_in_the_interpreter(name: str) -> None:
    found = checks.check(Setting("cpu", "float16", 32, 300), name, "triton")
    assert found.fine and found.error > 0, str(found)


def scaled(scores: TokenScores, name: str, by: float) -> TokenScores:
    value: Tensor = getattr(scores, name)
    return scores._replace(**{name: ~value if value.dtype == torch.bool else value * by})


# A quantity, and the case in which it must be found wrong.
WRONG = [
    ("logp", "plain"),
    *((name, "statistics") for name in TokenScores._fields),
    ("mean_logits", "statistics, softcap"),
    ("lse", "overflowing rows"),
    ("logp", "1 row"),
]


@pytest.mark.parametrize("by", [1.1, float("nan")])
@pytest.mark.parametrize("quantity, name", WRONG)
def test_wrong_outputs_are_found_out(
    monkeypatch: pytest.MonkeyPatch, quantity: str, name: str, by: float
) -> None:
    monkeypatch.setattr(
        checks, "linear_logprob", lambda *a, **k: scaled(linear_logprob(*a, **k), quantity, by)
    )
    found = checks.check(SETTING, name, "torch")
    assert found.quantity.startswith(quantity) and not found.fine
    assert str(found).startswith(f"{found.quantity}: ")


@pytest.mark.parametrize("spoil", [lambda g: g * 1.1, lambda g: g.index_fill(0, ROW, 0.0)])
@pytest.mark.parametrize(
    "name, needed",
    [
        (name, needed)
        for name in (
            *("frozen head", "kept", "recomputed"),
            *("ragged vocabulary", "overflowing rows", "129 rows"),
        )
        for needed in checks.CHECKS[name].needs
        if needed in ("hidden", "weight")
    ],
)
def test_wrong_gradients_are_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str, needed: str, spoil: Callable[[Tensor], Tensor]
) -> None:
    def spoilt(**arguments: Any) -> TokenScores:
        leaf = arguments[needed]
        if leaf.requires_grad:
            view = leaf.view_as(leaf)
            view.register_hook(spoil)
            arguments[needed] = view
        return linear_logprob(**arguments)

    monkeypatch.setattr(checks, "linear_logprob", spoilt)
    found = checks.check(SETTING, name, "torch")
    assert found.quantity.startswith(f"d {needed}, ") and not found.fine


ROW = torch.tensor([70])  # the last of hidden, and one of the weight's


def test_the_cases_hold_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = checks._expected(SETTING, "overflowing rows")
    assert (expected.exact["logp"] < -100).sum() >= 5
    top = checks._expected(SETTING, "statistics").exact["is_top1"]
    assert 5 < top.sum() < len(top)
    assert checks._expected(SETTING, "1 row").exact["logp"].shape == (checks.YARDSTICK_ROWS,)


def test_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recomputed", "statistics", "129 rows"):
        found = {}
        for rows in (7, 10_000):
            monkeypatch.setattr(checks, "BLOCK_ROWS", rows)
            checks._expected.cache_clear()
            found[rows] = checks._expected(SETTING, name).exact
        for quantity, value in found[7].items():
            torch.testing.assert_close(value, found[10_000][quantity])


def test_at_their_true_size_there_are_two_waves_of_tiles() -> None:
    """For the cards with the most multiprocessors, 192."""
    for name in ("plain", "statistics", "kept", "recomputed"):
        case = CHECKS[name]
        assert case.rows // 128 * (case.vocab // 256) > 1.8 * 192


@pytest.mark.parametrize("wrong", [Error("b", float("nan"), 1.0), Error("b", 0.01, 0.0)])
def test_what_is_wrong_hides_behind_nothing(wrong: Error) -> None:
    assert not wrong.fine
    for errors in itertools.permutations([Error("a", 0.5, 1.0), wrong, Error("c", 0.9, 1.0)]):
        assert max(errors, key=checks._badness) == wrong
