# SPDX-License-Identifier: Apache-2.0
"""Log-ratios reshaped, or chosen and rejected apart: identities, edges and TRL."""

import math
import types

import numpy as np
import pytest
import torch

from fastpref import objectives

from . import trl_dpo

RNG = np.random.default_rng(2)
LOGPS = torch.tensor(RNG.uniform(-60.0, 0.0, (4, 64)))
LENGTHS = torch.tensor(RNG.integers(1, 40, (2, 64)))
NO_KL = {"chosen_kl": torch.zeros(64), "rejected_kl": torch.zeros(64)}


def evaluate(name, *, logps=LOGPS, **settings):
    """Losses and their slopes in x_w and x_l."""
    policy = [row.clone().requires_grad_() for row in logps[:2]]
    result = getattr(objectives, name)(*policy, *logps[2:], **settings)
    slopes = torch.autograd.grad(result.losses.sum(), policy, materialize_grads=True)
    return result.losses.detach(), *slopes


def on_log_ratios(name, chosen, rejected, *, dtype=torch.float64, **settings):
    """The same where the log-ratios are given."""
    rows = torch.tensor([chosen, rejected], dtype=dtype)
    return evaluate(name, logps=torch.cat([rows, torch.zeros_like(rows)]), **settings)


@pytest.mark.parametrize(
    ("name", "settings", "other", "its_settings"),
    [
        ("f_dpo", {}, "dpo", {}),
        ("flex_dpo", {"beta_rejected": 0.1}, "dpo", {}),
        (
            "flex_dpo",
            {"beta_chosen": 0.4, "beta_rejected": 0.3},
            "dpo_shift",
            {"beta": 0.4, "shift": 0.75},
        ),
        ("dpop", {"penalty": 0.0}, "dpo", {}),
        ("dpo_shift", {"shift": 1.0}, "dpo", {}),
        ("cal_dpo", {"calibration_weight": 0.0}, "dpo", {"beta": 1.0}),
        ("tdpo", NO_KL, "dpo", {}),
        ("tdpo", {"version": 1, **NO_KL}, "dpo", {}),
    ],
)
def test_special_cases(name, settings, other, its_settings):
    expected = evaluate(other, **its_settings)
    for got, value in zip(evaluate(name, **settings), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)


def test_nca_pair_is_least_where_the_chosen_is_twice_as_likely_as_noise():
    losses, chosen, rejected = on_log_ratios("nca_pair", [math.log(2) / 0.01], [0.0])
    assert abs(chosen.item()) < 1e-15 and rejected.item() == pytest.approx(0.01 / 4)
    assert losses.item() == pytest.approx(math.log(3 / 2) + math.log(3) / 2 + math.log(2) / 2)


def test_sppo_hard_regresses_on_its_targets():
    losses, chosen, rejected = on_log_ratios("sppo_hard", [5.0, 6.0], [-5.0, -3.0], beta=0.1)
    assert losses.tolist() == [0.0, 5.0]
    assert chosen.tolist() == [0.0, 2.0] and rejected.tolist() == [0.0, 4.0]


@pytest.mark.parametrize("name", ["apo_zero", "sppo_hard"])
def test_scope_unit_means_that_each_response_stands_alone(name):
    assert objectives.get(name).scope == "unit"
    _, chosen, rejected = evaluate(name)
    other_rejected, other_chosen = LOGPS.clone(), LOGPS.clone()
    other_rejected[1], other_chosen[0] = LOGPS[1].flip(0), LOGPS[0].flip(0)
    assert torch.equal(evaluate(name, logps=other_rejected)[1], chosen)
    assert torch.equal(evaluate(name, logps=other_chosen)[2], rejected)


def test_apo_zero_raises_the_chosen_and_lowers_the_rejected():
    losses, chosen, rejected = evaluate("apo_zero")
    assert ((losses > 0) & (losses < 2)).all()
    assert (chosen < 0).all() and (rejected > 0).all()


def test_apo_down_lowers_both_once_they_are_apart():
    losses, chosen, rejected = on_log_ratios("apo_down", [0.0, 10.0], [-30.0, -40.0])
    assert ((losses > 0) & (losses < 2)).all()
    assert (chosen > 0).all() and (rejected > 0).all()


@pytest.mark.parametrize(
    ("divergence", "slope"), [("reverse_kl", 1), ("forward_kl", 1), ("js", 0.5)]
)
def test_f_dpo_near_the_reference_is_dpo(divergence, slope):
    """phi'(0) is the second derivative of f at 1."""
    actual = on_log_ratios("f_dpo", [1e-9], [-1e-9], divergence=divergence)
    expected = on_log_ratios("dpo", [1e-9], [-1e-9], beta=0.1 * slope)
    for got, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("alpha", "limit"), [(1e-9, "reverse_kl"), (1 - 1e-9, "forward_kl")])
def test_f_dpo_alpha_divergence_joins_the_two_kls(alpha, limit):
    actual = evaluate("f_dpo", divergence="alpha", alpha=alpha, beta=1e-5)
    for got, value in zip(actual, evaluate("f_dpo", divergence=limit, beta=1e-5), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "alpha"}, "f_dpo: divergence='alpha' needs alpha"),
        ({"alpha": 0.5}, "f_dpo: alpha belongs to divergence='alpha'; leave it None with 'rev"),
        ({"alpha": 1.0, "divergence": "alpha"}, r"in \(0, 1\) \(towards 0 the reverse KL"),
    ],
)
def test_f_dpo_takes_alpha_with_its_divergence_only(settings, message):
    with pytest.raises(ValueError, match=message):
        objectives.get("f_dpo", **settings)
    with pytest.raises(ValueError, match=message):
        objectives.f_dpo(*LOGPS, **settings)


@pytest.mark.parametrize(
    ("name", "sign", "settings"),
    [
        ("f_dpo", -1, {"divergence": "forward_kl"}),
        ("f_dpo", -1, {"divergence": "alpha", "alpha": 0.999}),
        ("chi_po", 1, {}),
    ],
)
def test_exponentials_saturate_but_order_and_train(name, sign, settings):
    """In fp32 far above exponent 60: finite, growing, with the slope reached there."""
    extreme = [sign * 100.0, sign * 9e3, sign * 1e4]
    chosen, rejected = (extreme, [0.0] * 3) if sign < 0 else ([0.0] * 3, extreme)
    losses, *slopes = on_log_ratios(name, chosen, rejected, dtype=torch.float32, **settings)
    assert torch.isfinite(losses).all() and (losses.diff() > 0).all()
    steep = slopes[0 if sign < 0 else 1].abs()
    torch.testing.assert_close(steep, torch.full((3,), 0.1 * math.exp(60)), rtol=1e-4, atol=0)


def test_chi_po_adds_the_density_ratio():
    losses, *_ = on_log_ratios("chi_po", [2.0, -3.0], [1.0, 4.0], beta=0.5)
    phi = [math.exp(2) + 2 - math.exp(1) - 1, math.exp(-3) - 3 - math.exp(4) - 4]
    np.testing.assert_allclose(losses, np.logaddexp(0, -0.5 * np.array(phi)), rtol=1e-12)


def test_chi_po_does_not_train_outside_its_clip():
    losses, chosen, rejected = on_log_ratios(
        "chi_po", [9.0, 0.1, -9.0], [-9.0, 0.0, 9.0], beta=1.0, max_reward=1.5
    )
    inside = math.exp(0.1) + 0.1 - 1
    np.testing.assert_allclose(losses, np.logaddexp(0, [-3.0, -inside, 3.0]), rtol=1e-12)
    assert (chosen != 0).tolist() == (rejected != 0).tolist() == [False, True, False]


def test_flex_dpo_adds_a_likelihood_term_with_its_gradient():
    nll = torch.rand(64, dtype=torch.float64, requires_grad=True)
    result = objectives.flex_dpo(*LOGPS, chosen_nll=nll, sft_weight=0.3)
    without = objectives.flex_dpo(*LOGPS)
    torch.testing.assert_close(result.losses, without.losses + 0.3 * nll, rtol=1e-12, atol=0)
    slope = torch.autograd.grad(result.losses.sum(), nll)[0]
    torch.testing.assert_close(slope, torch.full_like(nll, 0.3))
    torch.testing.assert_close(result.chosen_rewards, 0.1 * (LOGPS[0] - LOGPS[2]))
    torch.testing.assert_close(result.rejected_rewards, 0.08 * (LOGPS[1] - LOGPS[3]))


def test_flex_dpo_needs_the_nll_it_weighs():
    with pytest.raises(ValueError, match="sft_weight > 0 needs the extra chosen_nll"):
        objectives.flex_dpo(*LOGPS, sft_weight=0.1)


def test_dpop_pushes_a_fallen_chosen_response_harder():
    losses, chosen, rejected = on_log_ratios("dpop", [1.0, -1.0], [0.0, 0.0], penalty=4.0)
    margins = np.array([0.1, -0.5])
    np.testing.assert_allclose(losses, np.logaddexp(0, -margins), rtol=1e-12)
    wrong = 0.1 / (1 + np.exp(margins))
    np.testing.assert_allclose(chosen, -wrong * [1, 5], rtol=1e-12)
    np.testing.assert_allclose(rejected, wrong, rtol=1e-12)


def test_dpo_shift_has_no_default():
    with pytest.raises(TypeError, match="dpo_shift needs a value for shift"):
        objectives.get("dpo_shift")
    with pytest.raises(ValueError, match=r"shift must be in \(0, 1\] \(the weight of the rejected"):
        objectives.get("dpo_shift", shift=1.01)


def test_cal_dpo_is_dpo_without_beta_plus_a_calibration():
    expected = zip(evaluate("dpo", beta=1.0), evaluate("sppo_hard", beta=0.02), strict=True)
    actual = evaluate("cal_dpo", beta=0.02, calibration_weight=0.5)
    for got, (logistic, calibration) in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, logistic + 0.5 * calibration, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("version", "weight"), [(1, 1.0), (2, 0.7)])
def test_tdpo(version, weight):
    kls = [torch.rand(64, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    settings = {"version": version, "alpha": 0.7, "beta": 0.2}
    losses = objectives.tdpo(*LOGPS, chosen_kl=kls[0], rejected_kl=kls[1], **settings).losses
    chosen_kl, rejected_kl = (kl.detach() for kl in kls)
    gap = LOGPS[0] - LOGPS[2] - LOGPS[1] + LOGPS[3]
    margin = 0.2 * (gap - weight * (rejected_kl - chosen_kl))
    expected = np.logaddexp(0, -margin.numpy())
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-9)
    chosen, rejected = torch.autograd.grad(losses.sum(), kls, materialize_grads=True)
    slope = 0.2 * weight * torch.sigmoid(-margin)
    torch.testing.assert_close(rejected, slope)
    torch.testing.assert_close(chosen, -slope if version == 1 else torch.zeros_like(slope))


@pytest.mark.parametrize("name", ["nca_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_agrees_with_trl(name):
    ours = objectives.get(name, beta=0.2)
    trl_dpo.check(ours, LOGPS, LENGTHS, loss_type=name, beta=0.2)


@pytest.mark.parametrize(
    ("divergence", "theirs"),
    [("reverse_kl", "reverse_kl"), ("forward_kl", "forward_kl"), ("js", "js_divergence")],
)
def test_f_dpo_agrees_with_trl(divergence, theirs):
    ours = objectives.get("f_dpo", beta=0.2, divergence=divergence)
    settings = {"loss_type": "sigmoid", "beta": 0.2, "f_divergence_type": theirs}
    trl_dpo.check(ours, LOGPS / 4, LENGTHS, **settings)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_f_dpo_agrees_with_trl_on_the_mirrored_alpha(alpha, monkeypatch):
    """TRL's alpha-divergence knows float32 and less: here its float32 is float64."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    wide = types.SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(dpo_trainer, "torch", wide)
    ours = objectives.get("f_dpo", beta=0.2, divergence="alpha", alpha=alpha)
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha}
    settings |= {"loss_type": "sigmoid", "beta": 0.2}
    trl_dpo.check(ours, LOGPS / 4, LENGTHS, **settings)
