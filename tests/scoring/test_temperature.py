# SPDX-License-Identifier: Apache-2.0
"""A temperature for each token or row: scores and gradients against float64, shapes that broadcast,
what is not scored, what is traced, and the errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fastpref import (
    ScoringOptions,
    explain,
    linear_divergence,
    linear_logits,
    linear_logprob,
    sparse_divergence,
)
from fastpref.scoring.api import ask
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.backends.tiled import SPARE_ROWS, Tiled
from fastpref.scoring.packing import pack_whole
from fastpref.scoring.plain_scores import plain_scores
from fastpref.scoring.rows import row_scores
from fastpref.scoring.slab import Projection, Slab
from fastpref.scoring.statistics import OUTPUTS
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import BACKENDS, DTYPES, make_case, run, upstream_of, verify
from tests.scoring.test_numbers import SCHEDULES, options_of

VOCAB = 2051
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"ignored": 0.3},
    "everything": {"softcap": 5.0, "logit_scale": -0.7, "bias": True, "ignored": 0.3},
}
DIFFERENTIATED = ("logp", "entropy", "mean_logits", "lse")
backends = pytest.mark.parametrize("backend", BACKENDS)
features = pytest.mark.parametrize("feature", FEATURES)


@backends
@features
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logp(backend: str, dtype: torch.dtype, schedule: str, feature: str) -> None:
    options = options_of(backend, dtype, **SCHEDULES[schedule])
    verify(options, dtype, vocab=VOCAB, uneven=True, **FEATURES[feature])


@backends
@features
@pytest.mark.parametrize("schedule", ["keep", "kept in part", "slabs", "least tile"])
def test_all_outputs(backend: str, schedule: str, feature: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        options = options_of(backend, dtype, **SCHEDULES[schedule])
        given: dict[str, Any] = {"outputs": OUTPUTS, "differentiated": DIFFERENTIATED}
        verify(options, dtype, vocab=VOCAB, uneven=True, **given, **FEATURES[feature])


@backends
@features
def test_direct_and_no_gradient(backend: str, feature: str) -> None:
    for schedule in ("direct", "auto"):
        needs = ("hidden",) if schedule == "direct" else ()
        verify(
            ScoringOptions(backend=backend, schedule=schedule),
            torch.float32,
            needs=needs,
            differentiated=("logp",) if needs else (),
            uneven=True,
            **FEATURES[feature],
        )


@backends
def test_rows_that_move_their_anchor(backend: str) -> None:
    for dtype in DTYPES:
        verify(ScoringOptions(backend=backend), dtype, uneven=True, below=0.3, outputs=OUTPUTS)


@backends
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_equal_ones_are_a_number(backend: str, softcap: float | None) -> None:
    case, found = make_case(bias=True, softcap=softcap), []
    for temperature in (0.75, torch.full((140,), 0.75), torch.tensor([0.75], dtype=torch.bfloat16)):
        own = replace(case, map={"softcap": softcap, "temperature": temperature})
        given = {"outputs": OUTPUTS, "upstream": upstream_of(case, ("logp", "mean_logits"))}
        found.append(run(own, options=ScoringOptions(backend=backend), **given))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)
        torch.testing.assert_close(found[2][name], value, msg=name)


class Batch:
    """(B, T) positions, some of them not scored."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight = draw(3, 4, 5).requires_grad_(), draw(23, 5).requires_grad_()
        self.target = torch.randint(23, (3, 4), generator=generator)
        self.target[0, 1] = self.target[2, 3] = -100
        self.scored = self.target != -100
        self.temperature = draw(3, 4).exp()
        self.leaves = [self.hidden, self.weight]

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.target

    def plain(self, temperature: Tensor, **given: Any) -> Tensor:
        whole = temperature.expand(3, 4).masked_fill(~self.scored, 1)
        logp = plain_scores(*self.given, temperature=whole[..., None], **given).logp
        assert logp is not None
        return logp


def logp_of(batch: Batch, temperature: Tensor, **given: Any) -> Tensor:
    logp = linear_logprob(*batch.given, temperature=temperature, **given).logp
    assert logp is not None
    return logp


def check_gradients(batch: Batch, found: Tensor, expected: Tensor) -> None:
    gradients = (
        torch.autograd.grad(one.square().sum(), batch.leaves, retain_graph=True)
        for one in (found, expected)
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (3, 1), (4,), (1, 4), (3, 4)], ids=str)
def test_shapes_that_broadcast(shape: tuple[int, ...]) -> None:
    batch = Batch()
    temperature = 0.5 + torch.rand(shape, dtype=torch.float64)
    own = temperature if temperature.numel() > 1 else temperature.reshape(())
    torch.testing.assert_close(logp_of(batch, temperature), batch.plain(own))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-30])
def test_a_position_that_is_not_scored_may_have_any(value: float) -> None:
    batch = Batch()
    temperature = batch.temperature.masked_fill(~batch.scored, value)
    expected = batch.plain(batch.temperature)
    ids = torch.arange(23).expand(3, 4, 23)
    for given in ({}, {"restrict_to": ids}, {"options": ScoringOptions(schedule="recompute")}):
        # Which says so where a NaN is on its way, although it ends nowhere.
        with torch.autograd.set_detect_anomaly(True):
            found = logp_of(batch, temperature, **given)
            torch.testing.assert_close(found, expected)
            check_gradients(batch, found, expected)
    for bad in (0, 2):
        wrong = temperature.clone()
        wrong[bad, 0] = value
        with pytest.raises(ValueError, match=f"temperature must be greater than 0.*got {value}"):
            logp_of(batch, wrong)


def test_backward_reads_what_forward_did() -> None:
    """A batch's temperatures may be overwritten until then."""
    batch = Batch()
    for schedule in ("keep", "recompute"):
        temperature = batch.temperature.clone()
        found = logp_of(batch, temperature, options=ScoringOptions(schedule=schedule))
        temperature.fill_(9)
        expected = batch.plain(batch.temperature)
        check_gradients(batch, found, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_linear_logits(softcap: float | None) -> None:
    batch = Batch()
    ids = torch.randint(23, (3, 4, 6))
    given = {"softcap": softcap, "temperature": batch.temperature}
    found = linear_logits(batch.hidden, batch.weight, ids, **given)
    z = (batch.hidden @ batch.weight.t()).gather(-1, ids)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = z / batch.temperature[..., None]
    torch.testing.assert_close(found, expected)
    check_gradients(batch, found, expected)


def test_restricted() -> None:
    batch = Batch()
    ids = torch.arange(23).expand(3, 4, 23).masked_fill(torch.rand(3, 4, 23) < 0.4, -1)
    ids = ids.scatter(
        -1, batch.target.clamp(min=0)[..., None], batch.target.clamp(min=0)[..., None]
    )
    logits = (batch.hidden @ batch.weight.t()) / batch.temperature[..., None]
    inside = logits.masked_fill(ids < 0, -torch.inf).log_softmax(-1)
    expected = inside.gather(-1, batch.target.clamp(min=0)[..., None])[..., 0]
    found = logp_of(batch, batch.temperature, restrict_to=ids)
    torch.testing.assert_close(found, expected.masked_fill(~batch.scored, 0))


def test_a_low_rank_update() -> None:
    batch = Batch()
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(23, 2, dtype=torch.float64)
    weight = batch.weight.detach()
    found = linear_logprob(
        batch.hidden, weight, batch.target, temperature=batch.temperature, lora=(a, b, 0.5)
    ).logp
    batch.weight = weight + 0.5 * b @ a
    torch.testing.assert_close(found, batch.plain(batch.temperature))


def test_under_torch_func() -> None:
    """There positions that are not scored are rows too, which must not spoil the weight's gradient
    where a bias excludes ids."""
    batch = Batch()
    others = torch.stack([batch.temperature, batch.temperature + 1])
    bias = torch.zeros(23, dtype=torch.float64)
    excluded = next(id for id in range(23) if id not in batch.target)
    bias[excluded] = -torch.inf

    def loss(hidden: Tensor, weight: Tensor, temperature: Tensor) -> Tensor:
        given = {"bias": bias, "temperature": temperature}
        logp = linear_logprob(hidden, weight, batch.target, **given).logp
        assert logp is not None
        return logp.square().sum()

    gradients = func.grad(loss, argnums=(0, 1))
    leaves = [one.detach() for one in batch.leaves]
    mapped = func.vmap(gradients, in_dims=(None, None, 0))(*leaves, others)
    for at, temperature in enumerate(others):
        plain = batch.plain(temperature, bias=bias)
        expected = torch.autograd.grad(plain.square().sum(), batch.leaves)
        torch.testing.assert_close(gradients(*leaves, temperature), expected)
        torch.testing.assert_close(tuple(one[at] for one in mapped), expected)
    with pytest.raises(ValueError, match=r"temperature.*gradient.*temperature.detach\(\)"):
        func.grad(loss, argnums=2)(*leaves, batch.temperature)


def test_a_tangent_is_refused() -> None:
    """Which would be lost."""
    batch, ids = Batch(), torch.zeros(3, 4, 2, dtype=torch.int64)
    hidden, weight, target = (one.detach() for one in batch.given)
    message = r"temperature must not.*tangent.*pass temperature.detach\(\)"

    def logp(temperature: Tensor) -> Tensor | None:
        return linear_logprob(hidden, weight, target, temperature=temperature).logp

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(batch.temperature, torch.ones_like(batch.temperature))
        with pytest.raises(ValueError, match=message):
            logp(dual)
        with pytest.raises(ValueError, match=message):
            linear_logits(hidden, weight, ids, temperature=dual)
        assert logp(dual.detach()) is not None
    with pytest.raises(ValueError, match=message):
        func.jvp(logp, (batch.temperature,), (batch.temperature,))


def test_rows_that_are_no_token_have_none() -> None:
    """Times 0 the -inf of a bias would be NaN, in the weight's gradient too."""
    batch = Batch()
    asked = ask(*batch.given, temperature=batch.temperature)
    factor = asked.planned(batch.target, pack_whole(batch.target, -100)).row_factor()
    expected = batch.temperature.reciprocal().masked_fill(~batch.scored, 1)
    torch.testing.assert_close(factor, expected.view(-1))


def test_a_tile_that_was_not_planned() -> None:
    """Of more rows than it has."""
    rows = SPARE_ROWS + 3
    hidden, target = torch.randn(rows, 5, dtype=torch.float64), torch.zeros(rows).long()
    factor = 1 + torch.rand(rows, dtype=torch.float64)
    slab = Slab(torch.randn(9, 5, dtype=torch.float64), None, LogitMap(1.0, 0.0, factor))
    own = torch_backend.target_logits(hidden, slab, target).logit
    sums = Tiled(torch_backend).project(Projection(hidden, slab, None, target), own, False, False)
    logits = (hidden @ slab.weight.t()) * factor[:, None]
    torch.testing.assert_close(row_scores(sums, own).logp, logits.log_softmax(1)[:, 0])


def test_of_fake_tensors() -> None:
    with FakeTensorMode():
        hidden, weight = torch.zeros(3, 4, 5, requires_grad=True), torch.zeros(23, 5)
        target, temperature = torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 1)
        logp = linear_logprob(hidden, weight, target, temperature=temperature).logp
        assert logp is not None and logp.shape == (3, 4)
        ids = torch.zeros(3, 4, 2, dtype=torch.int64)
        assert linear_logits(hidden, weight, ids, temperature=temperature).shape == (3, 4, 2)


@pytest.mark.slow
def test_compiled() -> None:
    torch._dynamo.reset()

    def loss(batch: Batch, ids: Tensor) -> Tensor:
        given = {"temperature": batch.temperature, "softcap": 3.0}
        logits = linear_logits(batch.hidden, batch.weight, ids, **given)
        return linear_logprob(*batch.given, **given).logp.square().sum() + logits.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    batch, ids = Batch(), torch.randint(23, (3, 4, 2))
    found = [one(batch, ids) for one in (loss, compiled)]
    torch.testing.assert_close(*found)
    for one, other in zip(
        *(torch.autograd.grad(value, batch.leaves) for value in found), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.heavy
def test_the_fused_kernels_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    batch, options = Batch(), ScoringOptions(backend="triton")
    given = [one.detach().float() if one.is_floating_point() else one for one in batch.given]
    monkeypatch.setattr("fastpref.scoring.backends.unavailable_reason", lambda name, device: None)
    assert explain(*given, options=options, temperature=0.7).backend == "triton"
    plan = explain(*given, options=options, temperature=batch.temperature.float())
    assert plan.backend == "rows" and str(plan).count("rows")


def test_a_temperature_costs_no_product() -> None:
    batch = Batch()
    assert explain(*batch.given, temperature=batch.temperature) == explain(*batch.given)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (
            torch.ones(3),
            ValueError,
            r"temperature must .*\(3, 4\); got \(3,\).*temperature\[:, None",
        ),
        (torch.ones(2, 3, 4), ValueError, r"temperature must .*\(3, 4\); got \(2, 3, 4\)"),
        (torch.ones(3, 4).long(), TypeError, "temperature must be floating point, got torch.int64"),
        (torch.ones(3, 4, device="meta"), ValueError, "temperature must be on cpu.*got meta"),
        (
            torch.ones(3, 4).requires_grad_(),
            ValueError,
            r"temperature.*pass temperature.detach\(\)",
        ),
        ([1.0], TypeError, "temperature must be a number, got list"),
    ],
)
def test_errors(value: Any, error: type[Exception], message: str) -> None:
    batch, ids = Batch(), torch.zeros(3, 4, 2, dtype=torch.int64)
    with pytest.raises(error, match=message):
        linear_logprob(*batch.given, temperature=value)
    with pytest.raises(error, match=message):
        linear_logits(batch.hidden, batch.weight, ids, temperature=value)
    with pytest.raises(error, match=message):
        linear_logprob(*batch.given, temperature=value, restrict_to=ids)


def test_a_trained_temperature_scores_without_gradient() -> None:
    batch = Batch()
    with torch.no_grad():
        found = logp_of(batch, batch.temperature.clone().requires_grad_())
    torch.testing.assert_close(found, batch.plain(batch.temperature).detach())


def test_divergences_take_a_number() -> None:
    batch = Batch()
    models = batch.hidden, batch.weight, batch.hidden.detach(), batch.weight.detach()
    ids = torch.zeros(3, 4, 1, dtype=torch.int64)
    for call in (
        lambda: linear_divergence(*models, temperature=batch.temperature),
        lambda: sparse_divergence(
            *models[:2], ids, torch.zeros(3, 4, 1), temperature=batch.temperature
        ),
    ):
        with pytest.raises(TypeError, match=r"temperature .* number, got Tensor.*linear_log"):
            call()
