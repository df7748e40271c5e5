# SPDX-License-Identifier: Apache-2.0
"""The head alone: what it is compared with, and its candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpref.bench import exact_head, head
from fastpref.bench.cases import LIMIT, measure
from fastpref.bench.exact_head import Sample, sample
from fastpref.bench.experiment import MODES, Case, Mode, Outcome, errors
from fastpref.bench.work import Shape
from tests.kernels.conftest import _dot as multiply_tiles

SHAPE = Shape(4, 40, 16, 500, masked=0.25)


@pytest.fixture(autouse=True)
def exact_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, where these tests may find it on, multiplies bfloat16 wrongly."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply_tiles)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_head, "ROWS", 10)
    monkeypatch.setattr(exact_head, "COLUMNS", 20)
    monkeypatch.setattr(exact_head, "SLAB", 128)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("rows", [3, 300])
def test_a_sample_is_what_autograd_finds(rows: int) -> None:
    hidden, weight = torch.randn(rows, 16), torch.randn(500, 16)
    target = torch.randint(500, (rows,))
    found = sample(hidden, weight, target)
    leaves = [one.double().requires_grad_() for one in (hidden, weight)]
    log_probs = (leaves[0] @ leaves[1].t()).log_softmax(-1)
    logp = log_probs.gather(1, target[:, None])[:, 0]
    loss = -logp.mean()
    d_hidden, d_weight = torch.autograd.grad(loss, leaves)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    mean = (leaves[0] @ leaves[1].t()).mean(-1)
    assert rows - 1 in found.rows.tolist() and target[0] in found.columns
    pairs = [
        (found.loss, loss),
        *zip(found.scores, (one[found.rows] for one in (logp, entropy, mean)), strict=True),
        (found.d_hidden, d_hidden[found.rows]),
        (found.d_weight, d_weight[found.columns]),
    ]
    for got, want in pairs:
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6)


def test_a_sample_is_made_on_the_device() -> None:
    """Operators that mix devices fail there as on a GPU."""
    hidden, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device="meta") for n in (300, 500))
    found = sample(hidden, weight, torch.empty(300, dtype=torch.int64, device="meta"))
    tensors = [*found[:3], *found.scores, *found[4:]]
    assert {one.device.type for one in tensors} == {"meta"}


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize(
    "what, dtype, mode",
    [
        (what, dtype, mode)
        for what, dtype in (("head", "float32"), ("call", "bfloat16"))
        for mode in MODES
    ],
)
def test_every_candidate_is_right_and_what_is_missing_is_named(
    what: str, dtype: str, mode: Mode
) -> None:
    row = measure(Case(what, mode, dtype, SHAPE), 1, lambda text: None)
    timings, skipped = row["timings"], row["skipped"]
    assert {LIMIT, "fastpref, torch", "TRL fused head"} <= set(timings)
    for name in timings:
        if name != LIMIT:
            assert timings[name]["error"] < (1e-5 if dtype == "float32" else 3e-2), name
    lanes = {f"fastpref, {one}" for one in ("cpp", "rows", "fused", "fused, flattened", "cuda")}
    assert lanes <= set(timings) | set(skipped)
    assert skipped["fastpref, cuda"] and ("Cut Cross-Entropy" in skipped) == (what == "head")
    assert row["warnings"] == []


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_projected_gradient_is_right_beside_the_dense_one(dtype: str) -> None:
    shape = Shape(4, 40, 64, 500, masked=0.25)
    row = measure(Case("low-rank", "trainable head", dtype, shape), 1, lambda text: None)
    names = {"dense", "2 columns", "2 columns, choosing", "8 columns", "8 columns, choosing"}
    assert set(row["timings"]) == {LIMIT, *names} and not row["skipped"]
    for name in names:
        assert row["timings"][name]["error"] < (1e-5 if dtype == "float32" else 3e-2), name


def test_the_work_of_a_shape_is_made_once() -> None:
    head._packed.cache_clear()
    for mode in MODES:
        head.head_experiment(Case("head", mode, "bfloat16", SHAPE))
        head.call_experiment(Case("call", mode, "bfloat16", SHAPE))
    assert head._packed.cache_info().misses == 1


@pytest.mark.slow
@pytest.mark.heavy
def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(hidden: Any, weight: Any, target: Any) -> head.Found:
        loss, scores = head._plain(hidden, weight, target)
        return loss * 1.2, scores

    monkeypatch.setattr(head, "_liger", wrong)
    monkeypatch.setattr(head, "_no_liger", lambda device: None)
    row = measure(Case("head", "trainable head", "float32", SHAPE), 1, lambda text: None)
    assert row["skipped"]["Liger"].startswith("wrong: its error against float64 is")


def test_errors_of_scores() -> None:
    exact = Outcome(torch.tensor(2.0), (), (torch.tensor([1.0, 4.0]), torch.tensor([0.5])))
    near = Outcome(torch.tensor(2.0), (), (torch.tensor([1.0, 4.4]),))
    assert errors(near, exact).loss == pytest.approx(0.1 / 2**0.5)
    assert errors(exact._replace(scores=()), exact).loss == 0


def test_gradients_are_compared_where_they_are_known() -> None:
    known = Sample(torch.tensor([1]), torch.tensor([0, 2]), *[torch.tensor(0.0)] * 4)
    outcome = Outcome(
        torch.tensor(1.0), (torch.arange(4.0).view(2, 2), torch.eye(3)), (torch.arange(2),)
    )
    picked = head._picked(lambda: known, outcome)
    assert picked.gradients[0].tolist() == [[2.0, 3.0]] and picked.scores[0].tolist() == [1]
    assert torch.equal(picked.gradients[1], torch.eye(3)[[0, 2]])
