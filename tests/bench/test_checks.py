# SPDX-License-Identifier: Apache-2.0
"""The comparisons with float64 that a GPU gets first: they see what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.bench import checks, heard, properties, scorers
from fastpref.bench.checks import CHECKS, check
from fastpref.bench.contract import ulp, worst
from fastpref.bench.lanes import ON_CPU, ON_CUDA, Lane

TORCH = Lane("torch", "torch")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    heard.warnings.cache_clear()
    yield
    heard.warnings.cache_clear()


def quietly(text: str) -> None:
    return None


@pytest.mark.parametrize("name", CHECKS)
def test_plain_torch_is_right(name: str) -> None:
    row = check(name, TORCH, "cpu", quietly)
    assert row["passed"] is True and row["reason"] is None and 0 < row["share"] < 1, row


def wrong(share: float, key: str, rows: slice) -> Callable[..., dict[str, Tensor]]:
    """Scores as they are, but for one tensor in some of its rows."""
    scores = checks._scores

    def run(one: checks.Check, tensors: Any, options: Any) -> dict[str, Tensor]:
        found = scores(one, tensors, options)
        if options is not None:
            found[key][rows] = found[key][rows] * (1 + share)
        return found

    return run


@pytest.mark.parametrize(
    "name, key, share",
    [
        ("bf16", "logp", 0.1),
        ("fp32", "d weight", 0.5),
        ("fp32", "d hidden", float("nan")),
        ("bf16, every output", "entropy", float("inf")),
        ("fp32, every output, softcap and bias, in slabs", "mean_logits", 1e-3),
    ],
)
def test_one_wrong_row_is_seen(
    name: str, key: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_scores", wrong(share, key, slice(-1, None)))
    row = check(name, TORCH, "cpu", quietly)
    assert row["passed"] is False and row["worst"] == key and row["share"] > 1


def test_a_wrong_top_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = checks._scores

    def run(one: checks.Check, tensors: Any, options: Any) -> dict[str, Tensor]:
        found = scores(one, tensors, options)
        if options is not None:
            found["is_top1"] = ~found["is_top1"]
        return found

    monkeypatch.setattr(checks, "_scores", run)
    row = check("bf16, every output", TORCH, "cpu", quietly)
    assert row["passed"] is False and "is_top1" in row["reason"] and row["share"] < 1


def test_another_backend_that_stands_in_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    logprob = checks.linear_logprob

    def falls_back(*given: Any, **named: Any) -> Any:
        logging.getLogger("fastpref").warning("torch stands in for it: its probe failed")
        return logprob(*given, **named)

    assert check("bf16", TORCH, "cpu", quietly)["passed"] is True
    monkeypatch.setattr(checks, "linear_logprob", falls_back)
    row = check("bf16", TORCH, "cpu", quietly)
    assert row["passed"] is False and row["reason"] == "torch stands in for it: its probe failed"
    # It warns once a process: what comes after is no success either.
    monkeypatch.undo()
    assert check("fp32", TORCH, "cpu", quietly)["passed"] is False


def test_divergences_where_a_backend_has_none() -> None:
    row = check("bf16, forward KL", Lane("cuda", "cuda"), "cpu", quietly)
    assert row["passed"] is None and "has no divergences" in row["reason"]


@pytest.mark.parametrize("name", CHECKS)
def test_the_references_are_made_on_the_device(name: str) -> None:
    """Operators that mix devices fail there as on a GPU."""
    one = CHECKS[name]
    run = checks._divergence if one.divergence else checks._scores
    found = run(one, checks._tensors(one, "meta"), None)
    assert {value.device.type for value in found.values()} == {"meta"}


def test_the_contract() -> None:
    exact = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    eager = {"a": (exact + 1e-3).float()}
    assert worst({"a": (exact + 2e-3).float()}, eager, {"a": exact}).share < 1
    assert worst({"a": (exact + 2.1e-3).float()}, eager, {"a": exact}).share > 1
    none = {"a": exact.float()}
    assert worst(none, none, {"a": exact}).share == 0
    assert ulp(1.0, torch.float32) == torch.finfo(torch.float32).eps
    assert ulp(3.0, torch.bfloat16) == 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", properties.PROPERTIES)
@pytest.mark.parametrize("lane", ON_CPU, ids=lambda lane: lane.name)
def test_properties(name: str, lane: Lane) -> None:
    row = properties.observe(name, lane, "cpu", quietly)
    seen = name in ("the same bits in ten runs", "more than 2^31 logits")
    assert row["passed"] is (True if seen else None), row
    assert seen or row["reason"] == "needs CUDA"


def test_properties_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = properties._step, [0]

    def changes(*given: Any, **named: Any) -> dict[str, Tensor]:
        calls[0] += 1
        found = step(*given, **named)
        found["d weight"][-1] *= 1 + 0.5 * (calls[0] == 5)
        found["logp"][-1] += 3.0
        return found

    monkeypatch.setattr(properties, "_step", changes)
    row = properties.observe("the same bits in ten runs", TORCH, "cpu", quietly)
    assert row["passed"] is False and "d weight differs" in row["reason"]
    row = properties.observe("more than 2^31 logits", TORCH, "cpu", quietly)
    assert row["passed"] is False and row["reason"].startswith("relative error: logp 3")


def test_more_logits_than_a_32_bit_index_counts() -> None:
    assert properties.MANY.rows * properties.MANY.vocab > 2**31
    assert 2 * properties.MANY.rows * properties.MANY.vocab < properties.BUDGET


def test_a_lane_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Lane("new", "new").unavailable("cpu") == "there is no backend 'new'"
    assert "runs on CPU tensors" in str(Lane("cpp", "cpp").unavailable("cuda"))

    def raises(name: str, device: str) -> None:
        raise ModuleNotFoundError("no such library")

    # Also where the question itself fails.
    monkeypatch.setattr(scorers, "unavailable_reason", raises)
    assert [lane.unavailable("cuda") for lane in ON_CUDA] == [
        "ModuleNotFoundError: no such library"
    ] * len(ON_CUDA)
