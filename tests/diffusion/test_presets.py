# SPDX-License-Identifier: Apache-2.0
"""Published methods by name against the formulas of their papers and codes in float64: losses and
gradients, weights, masks and hyperparameters of one value a unit, and what they refuse."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.diffusion import (
    DATA,
    NOISE,
    Preset,
    convert,
    preset,
    presets,
    step_log_ratio,
)
from tests.diffusion import formulas
from tests.diffusion.cases import predictions

NAMES = (
    *("diffusion_dpo_sd15", "diffusion_dpo_sdxl", "diffusers_dpo_sd15", "diffusers_dpo_sdxl"),
    *("smpo_sd15", "smpo_sdxl", "inpo_sd15", "inpo_sdxl", "diffusion_kto", "rank_dpo", "ddo_edm"),
    *("flow_dpo", "d3po"),
)
every = pytest.mark.parametrize("name", NAMES)

B, SHAPE = 6, (3, 4, 5)
LABELS = torch.tensor([True, False, False, True, True, False])
SCORES = {
    "chosen_scores": torch.tensor([0.22, 0.25, 0.21], dtype=torch.float64),
    "rejected_scores": torch.tensor([0.21, 0.20, 0.21], dtype=torch.float64),
}
SIGMA = torch.tensor([0.1, 0.5, 2.0, 0.02, 10.0, 1.0])
STD = torch.tensor([0.3, 0.02, 1.5, 0.3, 0.1, 0.7])
SHARES = torch.tensor([[1.0, 1 / 3, 2 / 3], [0.5, 0.5, 1.0]])
GIVEN: dict[str, dict[str, Any]] = {
    "smpo_sd15": SCORES,
    "smpo_sdxl": SCORES,
    "diffusion_kto": {"labels": LABELS},
    "rank_dpo": {"scores": SHARES},
    "ddo_edm": {"labels": LABELS, "sigma": SIGMA},
    "d3po": {"std": STD},
}
# As published; of d3po beta and clip.
BETAS = {
    "diffusion_dpo_sd15": 2000.0,
    "diffusion_dpo_sdxl": 5000.0,
    "diffusers_dpo_sd15": 2500.0,
    "diffusers_dpo_sdxl": 5000.0,
    "smpo_sd15": 2000.0,
    "smpo_sdxl": 5000.0,
    "inpo_sd15": 2000.0,
    "inpo_sdxl": 5000.0,
    "diffusion_kto": 1000.0,
    "rank_dpo": 0.1,
    "ddo_edm": 0.02,
    "flow_dpo": 100.0,
    "d3po": 0.1,
}


def exact(name: str, model: Tensor, ref: Tensor, target: Tensor, beta: Any, **given: Any) -> Tensor:
    if name.startswith("smpo"):
        return formulas.smpo(model, ref, target, beta=beta, **given)
    if name == "ddo_edm":
        return formulas.ddo_edm(model, ref, target, beta=beta, **{"alpha": 1.0, **given})
    known: dict[str, Callable[..., Tensor]] = {
        "diffusion_kto": formulas.diffusion_kto,
        "rank_dpo": formulas.rank_dpo,
        "d3po": formulas.d3po,
    }
    if name in known:
        return known[name](model, ref, target, beta=beta, **given)
    half = 1.0 if name == "diffusers_dpo_sd15" else 0.5
    return formulas.diffusion_dpo(model, ref, target, beta=beta, half=half, **given)


def near(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of model and reference so far apart that logits are neither 0 nor large."""
    model, ref, target = predictions(B, *SHAPE)
    scale = {"ddo_edm": SIGMA.clamp(max=1), "d3po": STD}.get(name, torch.ones(B)).double()
    scale = scale.view(B, 1, 1, 1)  # errors of a denoiser and of a step are as large as the noise
    far = {"flow_dpo": 20, "rank_dpo": 30, "ddo_edm": 100, "d3po": 40}.get(name, 1)
    return ref + far * scale * (model - ref), ref, ref + scale * (target - ref)


def check(name: str, beta: Any, found: Any, rows: Any, **given: Any) -> None:
    model, ref, target = rows
    leaf = model.detach().double().requires_grad_()
    expected = exact(name, leaf, ref, target, beta, **given)
    torch.testing.assert_close(found.losses, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.loss, expected.mean(), rtol=1e-9, atol=1e-11)
    spread = float(expected.detach().std() / expected.detach().mean())
    assert (1e-4 if name == "d3po" else 0.05) < spread < 3
    found.loss.backward()
    expected.mean().backward()
    largest = float(leaf.grad.abs().max())
    torch.testing.assert_close(model.grad, leaf.grad, rtol=1e-8, atol=1e-9 * largest)


def test_names() -> None:
    assert presets() == NAMES


@every
def test_published(name: str) -> None:
    model, ref, target = near(name)
    given = GIVEN.get(name, {})
    found = preset(name)(model.requires_grad_(), ref, target, **given)
    check(name, BETAS[name], found, (model, ref, target), **given)
    assert {"loss/model", "loss/reference"} <= set(found.metrics)


@every
def test_beta_means_what_it_does_in_the_paper(name: str) -> None:
    model, ref, target = near(name)
    beta = 0.7 * BETAS[name]
    found = preset(name, beta=beta)(model.requires_grad_(), ref, target, **GIVEN.get(name, {}))
    check(name, beta, found, (model, ref, target), **GIVEN.get(name, {}))


@every
@pytest.mark.parametrize("when", ["made", "called"])
def test_one_value_a_unit(name: str, when: str) -> None:
    model, ref, target = near(name)
    given = GIVEN.get(name, {})
    units = {"diffusion_kto": B, "ddo_edm": B, "rank_dpo": 2}.get(name, B // 2)
    beta = BETAS[name] * torch.linspace(0.5, 1.5, units, dtype=torch.float64)
    made, called = ({"beta": beta}, {}) if when == "made" else ({}, {"beta": beta})
    found = preset(name, **made)(model.requires_grad_(), ref, target, **given, **called)
    check(name, beta, found, (model, ref, target), **given)


@pytest.mark.parametrize(
    "name, given",
    [
        ("ddo_edm", {"alpha": torch.tensor([1.0, 0.5, 6.0, 2.0, 1.0, 3.0]).double()}),
        ("d3po", {"clip": torch.tensor([1e-6, 0.5, 0.1]).double()}),
    ],
    ids=["alpha", "clip"],
)
def test_other_hyperparameters_of_each_unit(name: str, given: dict[str, Any]) -> None:
    rows = near(name)
    found = preset(name, **given)(rows[0].requires_grad_(), *rows[1:], **GIVEN[name])
    check(name, BETAS[name], found, rows, **GIVEN[name], **given)


@every
def test_weight_and_mask(name: str) -> None:
    """A weight of 0 and a mask without the sample take it out; both multiply and restrict what is
    there."""
    model, ref, target = near(name)
    given, own = GIVEN.get(name, {}), preset(name)
    weight = torch.linspace(0.2, 1.7, B, dtype=torch.float64)
    z = own(model, ref, target, **given).logps
    weighed = own(model, ref, target, weight=weight, **given)
    torch.testing.assert_close(weighed.logps, z * weight)
    mask = torch.rand(B, 1, 4, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    masked = own(model, ref, target, mask=mask, **given)
    gap = formulas.errors(ref, target, mask, own.reduction == "mean")
    gap = gap - formulas.errors(model, target, mask, own.reduction == "mean")
    whole = formulas.errors(ref, target, mean=own.reduction == "mean")
    whole = whole - formulas.errors(model, target, mean=own.reduction == "mean")
    torch.testing.assert_close(masked.logps, z / whole * gap, rtol=1e-8, atol=1e-12)


def test_weights_of_pairs_as_the_script_has_them() -> None:
    """A timestep's weight multiplies the errors."""
    model, ref, target = near("flow_dpo")
    weight = (1 - torch.tensor([0.1, 0.5, 0.9]).repeat(2)) ** 2
    found = preset("flow_dpo")(model, ref, target, weight=weight)
    want = formulas.diffusion_dpo(model, ref, target, beta=100.0, weight=weight)
    torch.testing.assert_close(found.losses, want)


def test_diffusers_without_the_half_is_diffusion_dpo_at_twice_the_beta() -> None:
    rows = near("diffusers_dpo_sd15")
    one = preset("diffusers_dpo_sd15")(*rows)
    other = preset("diffusion_dpo_sd15", beta=5000.0)(*rows)
    torch.testing.assert_close(one.losses, other.losses)


def test_smpo_of_equal_scores_learns_nothing() -> None:
    model, ref, target = near("smpo_sd15")
    scores = torch.full((3,), 0.2)
    found = preset("smpo_sd15")(
        model.requires_grad_(), ref, target, chosen_scores=scores, rejected_scores=scores
    )
    found.loss.backward()
    assert torch.allclose(found.losses, torch.full((3,), math.log(2)).double())
    assert (model.grad == 0).all()


def test_smpo_of_another_scorer() -> None:
    rows = near("smpo_sd15")
    scores = {"chosen_scores": torch.tensor([5.0, 2.0, 4.0]), "rejected_scores": torch.ones(3)}
    found = preset("smpo_sd15", low=0, high=10, gamma=2.0)(*rows, **scores)
    share = torch.sigmoid((scores["chosen_scores"] - 1).double() / 10)
    want = formulas.diffusion_dpo(*rows, beta=2000.0 * 2.0 * (2 * share - 1))
    torch.testing.assert_close(found.losses, want, rtol=1e-6, atol=1e-8)


def test_inverted_target() -> None:
    """What InPO and SmPO regress on is a conversion."""
    x0, noisy = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    bar = torch.tensor([0.9, 0.5, 0.1, 0.3], dtype=torch.float64)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    found = convert(x0, noisy, path=(alpha, sigma), source=DATA, target=NOISE)
    shaped = [one.view(4, 1, 1) for one in (alpha, sigma)]
    torch.testing.assert_close(found, (noisy - shaped[0] * x0) / shaped[1])


@pytest.mark.parametrize("sigma_data", [None, 1.3])
def test_edm_s_weight_is_that_of_its_network(sigma_data: float | None) -> None:
    """w ||D - x||^2 = ||F - F*||^2, of the network's own output and its target."""
    data, noise, output = torch.randn(3, B, 7, dtype=torch.float64)
    s, d = SIGMA.double()[:, None], 0.5 if sigma_data is None else sigma_data
    said = {} if sigma_data is None else {"sigma_data": sigma_data}
    noisy = data + s * noise
    skip, out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
    denoised = skip * noisy + out * output
    own_target = (data - skip * noisy) / out
    found = preset("ddo_edm", beta=1.0)(
        denoised, torch.zeros_like(data), data, labels=LABELS, sigma=SIGMA.double(), **said
    )
    weight = (s**2 + d**2) / (s * d) ** 2
    of_ref = (weight * data**2).sum(1)
    torch.testing.assert_close(found.logps, of_ref - ((output - own_target) ** 2).sum(1))


def test_ddo_is_half_of_the_code_s_loss() -> None:
    """Which has a real and a generated sample in each row, of one sigma and noise, and adds up
    their losses: (1 + alpha) log 2 of a model that is its reference."""
    model, ref, target = near("ddo_edm")
    sigma, alpha, beta = SIGMA[:3].repeat(2), 3.0, 0.02
    given = {"labels": torch.arange(B) < B // 2, "sigma": sigma}
    weight = (sigma.double() ** 2 + 0.25) / (0.5 * sigma.double()) ** 2

    def code(denoised: Tensor) -> Tensor:
        log_p, log_ref = (
            -(weight.view(-1, 1, 1, 1) * (one - target) ** 2).sum((1, 2, 3))
            for one in (denoised, ref)
        )
        real, generated = (log_p - log_ref).chunk(2)
        return (
            -torch.nn.functional.logsigmoid(beta * real)
            - alpha * torch.nn.functional.logsigmoid(-beta * generated)
        ).mean()

    found = preset("ddo_edm", alpha=alpha)(model.requires_grad_(), ref, target, **given)
    want = code(model)
    torch.testing.assert_close(2 * found.loss, want)
    ours, theirs = (torch.autograd.grad(one, model)[0] for one in (found.loss, want))
    torch.testing.assert_close(2 * ours, theirs)
    first = preset("ddo_edm", alpha=alpha)(ref, ref, target, **given)
    assert 2 * float(first.loss) == pytest.approx((1 + alpha) * math.log(2))


def test_d3po_is_the_ratio_of_steps() -> None:
    mean, ref, sample = near("d3po")
    found = preset("d3po")(mean, ref, sample, std=STD.double())
    torch.testing.assert_close(found.logps, step_log_ratio(sample, mean, ref, std=STD.double()))
    one = preset("d3po")(mean, ref, sample, std=0.3)
    torch.testing.assert_close(one.logps, step_log_ratio(sample, mean, ref, std=0.3))


def test_anchors() -> None:
    """Of a model that is its reference: log 2 of pairs and of real and generated rows, 1/2 of
    KTO."""
    _, ref, target = predictions(B, 8)
    for name in NAMES:
        loss = preset(name)(ref, ref, target, **GIVEN.get(name, {})).losses
        if name == "rank_dpo":
            pairs = formulas.rank_dpo(ref, ref, target, beta=0.1, scores=SHARES)
            torch.testing.assert_close(loss, pairs)
            continue
        want = 0.5 if name == "diffusion_kto" else math.log(2)
        torch.testing.assert_close(loss, torch.full_like(loss, want))


def test_rank_dpo_of_two_is_dpo_of_the_gain() -> None:
    rows = near("rank_dpo")
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])
    found = preset("rank_dpo")(*rows, scores=scores)
    z = found.logps.view(3, 2) * torch.tensor([[1, -1], [-1, 1], [1, -1]])
    discount = 1 / math.log(2) - 1 / math.log(3)
    gain = torch.tensor([1.0, 1.0, 2 - 2**0.5], dtype=torch.float64)
    want = gain * discount * torch.nn.functional.softplus(-0.1 * z.sum(1))
    torch.testing.assert_close(found.losses, want, rtol=1e-6, atol=1e-8)
    assert discount == pytest.approx(0.532, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_predictions_keep_the_logit(dtype: torch.dtype) -> None:
    """A pair's logit at beta 5000 within 1e-4 of float64's of the same predictions; errors that are
    kept in halves miss it by 100 times as much at least."""
    generator = torch.Generator().manual_seed(0)
    target, miss, apart = torch.randn(3, 32, 4, 32, 32, generator=generator, dtype=torch.float64)
    ref = (target + 0.4 * miss).to(dtype)
    model = (target + 0.4 * miss + 0.002 * apart).float()
    target = target.to(dtype)
    rewards = preset("diffusion_dpo_sdxl")(model, ref, target).rewards
    exact = 2500 * (formulas.errors(ref, target) - formulas.errors(model, target))
    dims = (1, 2, 3)
    halves = (model.float() - target.float()).square().mean(dims)
    halves = 2500 * ((ref - target).square().mean(dims).float() - halves)
    ours, theirs = (float((one - exact).square().mean().sqrt()) for one in (rewards, halves))
    assert ours < 1e-4 and theirs > 100 * ours


@every
def test_says_what_it_is(name: str) -> None:
    found = preset(name)
    assert isinstance(found, Preset) and found.name == name
    assert found.reduction == ("sum" if name in ("rank_dpo", "ddo_edm") else "mean")
    assert found.objective.hyperparameters["beta"] == BETAS[name]
    assert found.weight in (0.5, 1.0)
    for word in ("arXiv:", "weight", found.reduction, "eta"):
        assert word in found.source
    for extra in GIVEN.get(name, {}):
        assert extra in found.source
    if name == "diffusion_dpo_sd15":  # the paper's; its code's own launcher has another
        assert "2000 for Stable Diffusion 1.5" in found.source and "have 5000" in found.source
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.weight = 2.0
    assert preset(name) == found and hash(preset(name)) == hash(found)


@pytest.mark.heavy
def test_compile() -> None:
    def loss(model: Tensor, ref: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return preset_loss(model, ref, target, weight=weight).loss

    preset_loss = preset("flow_dpo")
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    rows = [one.float() for one in near("flow_dpo")]
    rows[0].requires_grad_()
    weight = torch.linspace(0.5, 1.0, B)
    found, expected = compiled(*rows, weight), loss(*rows, weight)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(one, rows[0]) for one in (found, expected))
    torch.testing.assert_close(ours, theirs)


ONE = torch.ones(4, 3)
TWO = torch.ones(2)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("flow_dpo", {"target": ONE[:, :2]}, ValueError, "target must be shaped like model_pred"),
    ("flow_dpo", {"model_pred": None}, TypeError, "model_pred must be a torch.Tensor"),
    ("flow_dpo", {"weight": torch.ones(2)}, ValueError, r"weight.*\(4,\), one a sample"),
    ("flow_dpo", {"weight": -torch.ones(4)}, ValueError, "weight must be finite and not negative"),
    ("flow_dpo", {"labels": TWO}, TypeError, "flow_dpo takes no extras, got 'labels'"),
    ("smpo_sd15", {}, TypeError, "takes chosen_scores, rejected_scores; chosen_scores is missing"),
    (
        "smpo_sd15",
        {"chosen_scores": TWO, "rejected_score": TWO},
        TypeError,
        "got 'rejected_score'; did you mean 'rejected_scores'",
    ),
    (
        "smpo_sd15",
        {"chosen_scores": TWO, "rejected_scores": torch.tensor([0.5, 2.0])},
        ValueError,
        "chosen_scores must not be below rejected_scores.*got 1 and 2 for pair 1; swap",
    ),
    (
        "smpo_sd15",
        {"chosen_scores": torch.ones(3), "rejected_scores": TWO},
        ValueError,
        r"chosen_scores must be of shape \(2,\), got \(3,\)",
    ),
    (
        "smpo_sd15",
        {"chosen_scores": TWO, "rejected_scores": 0.5},
        TypeError,
        "rejected_scores must be a torch.Tensor, got float",
    ),
    ("diffusion_kto", {"labels": TWO}, ValueError, r"kto: labels must be shaped like"),
    ("rank_dpo", {"scores": TWO}, ValueError, r"scores must be \(G, K\).*4 rows.*got \(2,\)"),
    ("rank_dpo", {"scores": torch.ones(4, 1)}, ValueError, r"lists of K >= 2.*got \(4, 1\)"),
    ("rank_dpo", {"scores": torch.ones(2, 3)}, ValueError, r"4 rows.*got \(2, 3\)"),
    ("rank_dpo", {"scores": [[1, 0], [1, 0]]}, TypeError, "scores must be a torch.Tensor"),
    ("ddo_edm", {"labels": torch.ones(4)}, TypeError, "sigma is missing"),
    (
        "ddo_edm",
        {"labels": torch.ones(4), "sigma": torch.tensor([1.0, 0.0, 1.0, 1.0])},
        ValueError,
        "sigma must be finite and positive, got 0",
    ),
    (
        "ddo_edm",
        {"labels": torch.ones(4), "sigma": 1.0, "sigma_data": 0.0},
        ValueError,
        "sigma_data must be a positive number, got 0.0",
    ),
    ("d3po", {"std": 0.0}, ValueError, "std must be finite and positive, got 0.0"),
    ("d3po", {"std": torch.ones(3)}, ValueError, r"std.*\(4,\), one a sample, got shape \(3,\)"),
    ("d3po", {}, TypeError, "d3po takes std; std is missing"),
]


@pytest.mark.parametrize("name, given, error, message", BAD, ids=range(len(BAD)))
def test_refused(name: str, given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model_pred": ONE, "ref_pred": ONE, "target": ONE} | given
    with pytest.raises(error, match=message):
        preset(name)(**arguments)


def test_no_such_preset() -> None:
    with pytest.raises(ValueError, match="no preset is called 'difusion_dpo'; perhaps diffusion_d"):
        preset("difusion_dpo")
    with pytest.raises(ValueError, match="perhaps flow_dpo"):
        preset("Flow-DPO")
    with pytest.raises(TypeError, match="name must be one of presets"):
        preset(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dpo: beta must be > 0"):
        preset("flow_dpo", beta=0.0)
    with pytest.raises(TypeError, match="dpo has no hyperparameter gamma"):
        preset("flow_dpo", gamma=1.0)
