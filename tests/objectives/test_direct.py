# SPDX-License-Identifier: Apache-2.0
"""Losses of one margin: float64 numpy formulas, identities, edges and TRL."""

import math

import numpy as np
import pytest
import torch

from fastpref import objectives

from . import trl_dpo

RNG = np.random.default_rng(0)
LOGPS = RNG.uniform(-60.0, 0.0, (4, 64))
LENGTHS = RNG.integers(1, 40, (2, 64))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def evaluate(function, /, *, lengths=None, **hyperparameters):
    """Losses, rewards and the gradient of the summed losses, as float64 arrays."""
    logps = [torch.tensor(row, requires_grad=True) for row in LOGPS]
    if lengths is not None:
        hyperparameters["chosen_lengths"] = torch.tensor(lengths[0])
        hyperparameters["rejected_lengths"] = torch.tensor(lengths[1])
    result = function(*logps, **hyperparameters)
    gradients = torch.autograd.grad(result.losses.sum(), logps)
    return [t.detach().numpy() for t in (*result, *gradients)]


def log_ratios():
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    return chosen - ref_chosen, rejected - ref_rejected


def check(actual, losses, slope, beta, weights=(1.0, 1.0)):
    """``slope`` is d loss / d gap, ``weights`` d gap / d log-ratio."""
    chosen, rejected = log_ratios()
    d_chosen, d_rejected = slope * weights[0], -slope * weights[1]
    gradients = (d_chosen, d_rejected, -d_chosen, -d_rejected)
    everything = (losses, beta * chosen, beta * rejected, *gradients)
    for got, expected in zip(actual, everything, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("beta", "eps"), [(0.1, 0.0), (0.5, 0.0), (0.1, 0.2), (3.0, 0.49)])
def test_dpo(beta, eps):
    chosen, rejected = log_ratios()
    m = beta * (chosen - rejected)
    losses = (1 - eps) * np.logaddexp(0, -m) + eps * np.logaddexp(0, m)
    slope = beta * (-(1 - eps) * sigmoid(-m) + eps * sigmoid(m))
    check(evaluate(objectives.dpo, beta=beta, label_smoothing=eps), losses, slope, beta)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_mean_divides_by_length(beta):
    chosen, rejected = log_ratios()
    gap = chosen / LENGTHS[0] - rejected / LENGTHS[1]
    losses, slope = (gap - 0.5 / beta) ** 2, 2 * (gap - 0.5 / beta)
    actual = evaluate(objectives.ipo, lengths=LENGTHS, beta=beta)
    check(actual, losses, slope, beta, weights=1 / LENGTHS)


def test_ipo_sum_is_the_equation_of_the_paper():
    chosen, rejected = log_ratios()
    gap = chosen - rejected
    actual = evaluate(objectives.ipo, beta=0.1, normalize="sum")
    check(actual, (gap - 5) ** 2, 2 * (gap - 5), 0.1)


def test_ipo_mean_takes_an_empty_response_as_zero():
    lengths = LENGTHS.copy()
    lengths[0, :8] = 0
    losses, _, _, d_chosen, *_ = evaluate(objectives.ipo, lengths=lengths)
    gap = -(LOGPS[1] - LOGPS[3])[:8] / lengths[1, :8]
    np.testing.assert_allclose(losses[:8], (gap - 5) ** 2, rtol=1e-9)
    assert (d_chosen[:8] == 0).all()


def test_ipo_mean_needs_lengths():
    with pytest.raises(ValueError, match="chosen_lengths"):
        evaluate(objectives.ipo)


@pytest.mark.parametrize("beta", [0.01, 0.1])
def test_hinge(beta):
    chosen, rejected = log_ratios()
    slack = 1 - beta * (chosen - rejected)
    check(
        evaluate(objectives.hinge, beta=beta),
        np.maximum(slack, 0),
        np.where(slack > 0, -beta, 0.0),
        beta,
    )


def test_equal_policy_and_reference_give_log_two():
    logps = torch.tensor(LOGPS)
    losses = objectives.dpo(logps[0], logps[1], logps[0], logps[1]).losses
    torch.testing.assert_close(losses, torch.full_like(losses, np.log(2)))


def test_zeros_are_a_uniform_reference():
    chosen, rejected = torch.tensor(LOGPS[:2])
    zeros = torch.zeros_like(chosen)
    losses = objectives.dpo(chosen, rejected, zeros, zeros, beta=0.3).losses
    expected = np.logaddexp(0, -0.3 * (LOGPS[0] - LOGPS[1]))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9)


def on_margins(function, /, margins, *, dtype=torch.float64, **settings):
    """Losses and slopes where x_w - x_l is ``margins``."""
    gap = torch.tensor(margins, dtype=dtype, requires_grad=True)
    zeros = torch.zeros_like(gap)
    losses = function(gap, zeros, zeros, zeros, **settings).losses
    return losses.detach(), torch.autograd.grad(losses.sum(), gap)[0]


MARGINS = np.linspace(-30.0, 30.0, 241)
WHOLE = {"chosen_lengths": torch.ones(241), "rejected_lengths": torch.ones(241)}


@pytest.mark.parametrize(
    ("name", "settings", "other", "its_settings", "factor"),
    [
        ("robust_dpo", {"label_smoothing": 0.0}, "dpo", {}, 1.0),
        ("gpo", {"beta": 0.3}, "dpo", {"beta": 0.3}, 1.0),
        ("gpo", {"beta": 0.3, "function": "hinge"}, "hinge", {"beta": 0.3}, 1.0),
        (
            "gpo",
            {"beta": 0.3, "function": "square"},
            "ipo",
            {"beta": 0.15, "normalize": "sum"},
            0.3**2,
        ),
        ("focal_po", {"gamma": 0.0}, "dpo", {}, 1.0),
        ("r_dpo", {"alpha": 0.0, **WHOLE}, "dpo", {}, 1.0),
        ("r_dpo", {"alpha": 0.7, **WHOLE}, "dpo", {}, 1.0),
        ("sigmoid_norm", {"beta": 0.3, **WHOLE}, "dpo", {"beta": 0.3}, 1.0),
        ("rainbow_po", {"alpha": 1.0, "beta": 0.3, **WHOLE}, "dpo", {"beta": 0.3}, 1.0),
    ],
)
def test_special_cases(name, settings, other, its_settings, factor):
    ours = on_margins(getattr(objectives, name), MARGINS, **settings)
    theirs = on_margins(getattr(objectives, other), MARGINS, **its_settings)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, factor * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [0.1, 0.3, 0.49])
def test_robust_dpo_is_unbiased_under_flipped_labels(eps):
    kept, _ = on_margins(objectives.robust_dpo, MARGINS, label_smoothing=eps)
    flipped, _ = on_margins(objectives.robust_dpo, -MARGINS, label_smoothing=eps)
    clean, _ = on_margins(objectives.dpo, MARGINS)
    torch.testing.assert_close((1 - eps) * kept + eps * flipped, clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", [1e-9, 0.001, 0.3])
def test_exo_pair_is_least_at_the_smoothed_label(eps):
    best = [(math.log1p(-eps) - math.log(eps)) / 0.1]
    losses, slopes = on_margins(objectives.exo_pair, best, label_smoothing=eps)
    assert abs(losses.item()) < 1e-12 and abs(slopes.item()) < 1e-12
    losses, slopes = on_margins(objectives.exo_pair, MARGINS, beta=1.0, label_smoothing=eps)
    assert (losses > 0).all()
    won = sigmoid(MARGINS)
    expected = won * (1 - won) * (MARGINS - 0.1 * best[0])
    np.testing.assert_allclose(slopes, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_exo_pair_needs_a_smoothed_label(eps):
    with pytest.raises(ValueError, match="at 0 the loss is infinite"):
        objectives.get("exo_pair", label_smoothing=eps)


def test_discopop_goes_from_logistic_to_exponential():
    losses, _ = on_margins(objectives.discopop, MARGINS, beta=1.0, tau=1e-3)
    expected = np.where(MARGINS > 0, np.exp(-MARGINS), np.logaddexp(0, -MARGINS))
    away = MARGINS != 0
    np.testing.assert_allclose(losses[away], expected[away], rtol=1e-12)
    np.testing.assert_allclose(losses[~away], (math.log(2) + 1) / 2, rtol=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.99])
def test_discopop_far_below_zero_is_logistic(tau):
    margins = [-2e5, -1e4, -500.0]
    losses, slopes = on_margins(
        objectives.discopop, margins, dtype=torch.float32, beta=1.0, tau=tau
    )
    rest = torch.exp((1 - 1 / tau) * torch.tensor(margins).abs())
    torch.testing.assert_close(losses, -torch.tensor(margins) + rest)
    torch.testing.assert_close(slopes, -1 + (1 / tau - 1) * rest)


@pytest.mark.parametrize(
    ("function", "settings", "rate"),
    [
        (objectives.discopop, {"beta": 1.0, "tau": 2.0}, 0.5),
        (objectives.gpo, {"beta": 1.0, "function": "exponential"}, 1.0),
    ],
)
def test_exponentials_saturate_along_their_tangent(function, settings, rate):
    """Above exponent 60: still growing, with the slope reached there."""
    margins = [-1e4 / rate, -100 / rate]
    losses, slopes = on_margins(function, margins, dtype=torch.float32, **settings)
    top = math.exp(60)
    expected = torch.tensor([top * 9941, top * 41])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(slopes, torch.full((2,), -rate * top), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        ("exponential", lambda m: np.exp(-m)),
        ("truncated_square", lambda m: np.maximum(0, 1 - m) ** 2),
        ("savage", lambda m: 1 / (1 + np.exp(m)) ** 2),
    ],
)
def test_gpo(function, formula):
    losses, _ = on_margins(objectives.gpo, MARGINS, beta=0.7, function=function)
    np.testing.assert_allclose(losses, formula(0.7 * MARGINS), rtol=1e-12)


def test_focal_po_gives_up_on_the_worst_pairs():
    """The loss turns where softplus(-m) = 1 / gamma."""
    turn = -math.log(math.expm1(1 / 0.5))
    _, slopes = on_margins(
        objectives.focal_po, [turn - 1e-3, turn, turn + 1e-3], beta=1.0, gamma=0.5
    )
    assert slopes[0] > 0 > slopes[2] and abs(slopes[1]) < 1e-12


def test_r_dpo_lets_length_explain_the_preference():
    longer, shorter = torch.tensor([20, 5, 7]), torch.tensor([10, 5, 9])
    losses, _ = on_margins(
        objectives.r_dpo,
        [1.0, 1.0, 1.0],
        beta=0.5,
        alpha=0.1,
        chosen_lengths=longer,
        rejected_lengths=shorter,
    )
    np.testing.assert_allclose(losses, np.logaddexp(0, -np.array([1.5, 0.5, 0.3])), rtol=1e-12)


@pytest.mark.parametrize("name", ["sigmoid_norm", "r_dpo", "rainbow_po"])
def test_empty_responses(name):
    """No tokens: no log-ratio and no gradient, whatever sum is given."""
    lengths = LENGTHS.copy()
    lengths[:, :8] = 0
    actual = evaluate(getattr(objectives, name), lengths=lengths)
    assert all(np.isfinite(value).all() for value in actual)
    if name != "r_dpo":  # which divides by no length
        at_zero = np.log(2) if name == "sigmoid_norm" else np.logaddexp(0, 10 * 0.75 * 0.1)
        np.testing.assert_allclose(actual[0][:8], at_zero, rtol=1e-12)
        assert all((gradient[:8] == 0).all() for gradient in actual[3:])


def test_rainbow_po_without_reference_is_simpo():
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), torch.tensor(LENGTHS), strict=True))
    logps = torch.tensor(LOGPS)
    ours = objectives.rainbow_po(*logps, **lengths, alpha=0.0, beta=2.0, gamma=0.3)
    simpo = objectives.simpo(*logps[:2], **lengths, beta=2.0, gamma=0.6)
    torch.testing.assert_close(ours.losses, simpo.losses, rtol=1e-12, atol=1e-12)


def test_rainbow_po_mixes_the_reference():
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    entropy = RNG.uniform(0.01, 0.99, 64)
    gap = (chosen - 0.4 * ref_chosen) / LENGTHS[0] - (rejected - 0.4 * ref_rejected) / LENGTHS[1]
    margin = 3.0 * (-0.5 * np.log(entropy)) * (gap - 0.6 * 0.2)
    settings = {"beta": 3.0, "alpha": 0.4, "gamma": 0.2, "phi": 0.5}
    settings["ref_entropy"] = torch.tensor(entropy)
    losses = evaluate(objectives.rainbow_po, lengths=LENGTHS, **settings)[0]
    np.testing.assert_allclose(losses, np.logaddexp(0, -margin), rtol=1e-9)
    settings["function"] = "cauchy"
    losses = evaluate(objectives.rainbow_po, lengths=LENGTHS, **settings)[0]
    np.testing.assert_allclose(losses, -np.log(np.arctan(margin) / np.pi + 0.5), rtol=1e-9)


def test_cauchy_keeps_its_lower_tail_in_fp32():
    margins = np.array([-1e6, -1e4, 0.0, 1e4])
    lengths = {"chosen_lengths": torch.ones(4), "rejected_lengths": torch.ones(4)}
    settings = {"alpha": 1.0, "beta": 1.0, "function": "cauchy", **lengths}
    losses, slopes = on_margins(objectives.rainbow_po, margins, dtype=torch.float32, **settings)
    tail = np.arctan2(1, -margins) / np.pi
    np.testing.assert_allclose(losses, -np.log(tail), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slopes, -1 / (np.pi * (1 + margins**2) * tail), rtol=1e-5)


@pytest.mark.parametrize("entropy", [0.0, 1.0])
def test_rainbow_po_entropy_is_inside_its_bounds(entropy):
    settings = {"lengths": LENGTHS, "ref_entropy": torch.full((64,), entropy)}
    with pytest.raises(ValueError, match=r"ref_entropy must be in \(0, 1\)"):
        evaluate(objectives.rainbow_po, **settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", {}),
        ("hinge", {}),
        ("ipo", {}),
        ("robust_dpo", {"label_smoothing": 0.2}),
        ("exo_pair", {"label_smoothing": 0.01}),
        ("discopop", {"tau": 0.3}),
        ("sigmoid_norm", {}),
    ],
)
def test_agrees_with_trl(name, settings):
    objective = objectives.get(name, beta=0.2, **settings)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), torch.tensor(LENGTHS), strict=True))
    extras = {key: lengths[key] for key in objective.extras}
    trl_dpo.check(
        lambda *logps: objective(*logps, **extras),
        torch.tensor(LOGPS),
        torch.tensor(LENGTHS),
        loss_type=objective.registration.loss_type,
        beta=0.2,
        **settings,
    )
