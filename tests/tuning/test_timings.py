# SPDX-License-Identifier: Apache-2.0
"""What is timed, and that it fits beside whatever else is on the card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpref import ScoringOptions
from fastpref.preference import explain
from fastpref.scoring import linear_logprob
from fastpref.scoring.plan import Plan
from fastpref.tuning import timings
from fastpref.tuning.checks import Setting
from fastpref.tuning.heads import MODELS
from tests.tuning.settings import SETTING, TIERS, shrink

GIGABYTE = 10**9
CACHE = 250 << 20  # twice the largest second-level cache, which the clock overwrites


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("mode", timings.MODES)
def test_every_tier_is_timed_doing_the_same(
    monkeypatch: pytest.MonkeyPatch, mode: str, heavy: bool
) -> None:
    shrink(monkeypatch)
    asked: set[tuple[Any, ...]] = set()
    said: list[str] = []

    def score(hidden: torch.Tensor, weight: torch.Tensor, *given: Any, **named: Any) -> Any:
        asked.add((hidden.requires_grad, weight.requires_grad, named["outputs"]))
        return linear_logprob(hidden, weight, *given, **named)

    monkeypatch.setattr(timings, "linear_logprob", score)
    found = timings.time(SETTING, mode, heavy, TIERS, said.append)
    assert list(found) == list(TIERS) and found[TIERS[0]].ratio == 1
    assert all(one.seconds > 0 for one in found.values())
    assert asked == {(*timings.MODES[mode], timings.OUTPUTS[heavy])}
    assert said[: len(TIERS)] == list(TIERS) and set(said) == set(TIERS)


@pytest.mark.parametrize("model", MODELS)
def test_it_takes_less_than_a_gigabyte(model: str) -> None:
    setting = Setting("cpu", "bfloat16", *MODELS[model])
    vocab, width, rows = timings.columns(setting), setting.hidden_size, timings.ROWS
    assert vocab == setting.vocab_size or vocab % timings.COLUMNS == 0
    assert vocab <= setting.vocab_size
    # Enough tiles of 128 by 256 for several waves.
    assert rows // 128 * (vocab // 256) > 3 * 192 or vocab == setting.vocab_size
    # Nobody touches them, so that they take no memory.
    hidden = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, requires_grad=True)
    options = ScoringOptions(backend="torch", memory_budget=2 * rows * vocab * 2)
    problem = explain(hidden, weight, torch.zeros(rows, dtype=torch.int64), options=options)
    assert isinstance(problem, Plan)
    assert problem.schedule == "keep" and problem.kept_rows == rows
    inputs = 2 * width * (rows + vocab)
    # With the gradients, and a copy of the rows.
    assert 2 * inputs + problem.saved_bytes + 2 * width * rows + CACHE < GIGABYTE
