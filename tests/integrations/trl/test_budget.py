# SPDX-License-Identifier: Apache-2.0
"""What memory the adapter gives itself on a GPU, where TRL's own head has to fit too."""

import logging
from dataclasses import replace

import pytest
import torch

from fastpref import ScoringOptions, explain
from fastpref.integrations import trl as integration
from fastpref.integrations.trl import LogProbAdapter, adapters, budget
from fastpref.scoring import plan as schedule
from tests.integrations.trl.head_calls import TILE, H, N, V, make_inputs

MIB = 1 << 20
TILE_BYTES = 4096 * 32768 * 2
H100 = 80 << 30
LLAMA, QWEN = (4096, 128256), (896, 151936)
HALF, WIDE = torch.bfloat16, torch.float32


def all_kept(rows: int, vocab: int) -> int:
    return -(-4 * rows * vocab * 2 // 3)


BUDGETS = {
    # rows, (H, V), dtype of the weight where it is trained, keeps: the budget
    "held by TRL's own": (8192, LLAMA, HALF, True, all_kept(8192, LLAMA[1])),
    "held by few rows": (2048, LLAMA, HALF, True, all_kept(2048, LLAMA[1])),
    "small H": (8192, QWEN, HALF, True, all_kept(8192, QWEN[1])),
    "more than a sixteenth": (65536, QWEN, HALF, True, H100 // 16),
    "float32 weight": (8192, LLAMA, WIDE, True, all_kept(8192, LLAMA[1])),
    "frozen, entropy": (8192, LLAMA, None, True, all_kept(8192, LLAMA[1])),
    "frozen": (8192, LLAMA, None, False, TILE_BYTES),
    "few rows": (100, LLAMA, None, False, 100 * 32768 * 2),
}


def budget_of(
    rows: int, head: tuple[int, int], trained: torch.dtype | None, keeps: bool, memory: int
) -> int:
    return integration.default_budget(
        rows,
        *head,
        torch.bfloat16,
        trained or torch.bfloat16,
        trains_weight=trained is not None,
        keeps=keeps,
        device_memory=memory,
    )


@pytest.mark.parametrize("name", BUDGETS)
def test_default_budget_on_a_gpu(name: str) -> None:
    rows, head, trained, keeps, expected = BUDGETS[name]
    assert budget_of(rows, head, trained, keeps, H100) == expected


MODELS = {
    "qwen2.5-0.5b": QWEN,
    "llama3.2-1b": (2048, 128256),
    "qwen2.5-1.5b": (1536, 151936),
    "qwen2.5-7b": (3584, 152064),
    "llama3-8b": LLAMA,
    "gemma2-9b": (3584, 256000),
}


@pytest.mark.parametrize("memory", [24, 40, 80])
@pytest.mark.parametrize("rows", [2048, 8192, 32768])
@pytest.mark.parametrize("name", MODELS)
def test_what_fits_with_trl_still_fits(name: str, rows: int, memory: int) -> None:
    """A gradient at the log-probabilities takes, by plan, no more than TRL, or has a sixteenth of
    the device for its workspace; and once that has run out, no more than TRL."""
    hidden_size, vocab = head = MODELS[name]
    budget = budget_of(rows, head, HALF, True, memory << 30)
    problem = schedule.Problem(
        scored=rows,
        hidden_size=hidden_size,
        trained_size=hidden_size,
        vocab_size=vocab,
        dtype=HALF,
        needs_hidden=True,
        needs_weight=True,
        needs_bias=False,
        only_logp=True,
        copies_weight=False,
        backend="rows",
        device_type="cuda",
        scores_in_tiles=True,
        temporary_bytes=0,
        total_memory=memory << 30,
    )
    plan = schedule.choose(problem, ScoringOptions(memory_budget=budget))
    # A tile, gradients of rows and of the weight in float32, and these rounded; numbers of rows.
    tile = min(rows, 4096) * 32768 * 2
    trl = tile + 6 * hidden_size * (rows + vocab) + 28 * rows
    result = 2 * hidden_size * vocab
    held = 2 * rows * (vocab + hidden_size) <= tile + 4 * hidden_size * vocab
    if held or budget > (memory << 30) // 16:
        assert plan.workspace_bytes + result <= trl
    assert (plan.kept_rows == rows) >= held
    while (smaller := schedule.less(plan, keep=False)) is not None:
        plan = smaller
    assert plan.workspace_bytes + result <= trl


@pytest.mark.parametrize("needs", ["nothing", "hidden", "weight"])
@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy")])
def test_options_on_a_gpu_follow_what_needs_a_gradient(
    needs: str, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, targets = make_inputs()
    for name, value in (("hidden", hidden), ("weight", weight)):
        value.requires_grad_(name == needs)
    plan = explain(hidden, weight, targets, outputs=outputs)
    on_gpu = replace(plan, device_type="cuda", total_memory=1 << 22)
    monkeypatch.setattr(budget, "TILE_ROWS", 10)
    options = adapters._options(on_gpu, weight.dtype, 64)
    keeps = needs == "weight" or (needs == "hidden" and "entropy" in outputs)
    theirs = 10 * 64 * 4 + (needs == "weight") * V * H * 4
    assert options.memory_budget == (max(theirs, -(-4 * N * V * 4 // 3)) if keeps else theirs)
    assert options.schedule == "auto"
    assert adapters._options(plan, weight.dtype, 64) == ScoringOptions(schedule="keep")


def test_the_plan_of_a_call_can_be_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, targets = make_inputs()
    given = ScoringOptions(memory_budget=3 * MIB)
    monkeypatch.setattr(adapters, "_options", lambda *_: given)
    with caplog.at_level(logging.DEBUG, logger="fastpref"):
        LogProbAdapter.apply(hidden, weight, None, targets, 1.0, TILE)
    assert any(
        "(budget 3.0 MiB, as TRL's own head, or what holds the exponentials)" in message
        for message in caplog.messages
    )
