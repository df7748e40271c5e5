# SPDX-License-Identifier: Apache-2.0
"""Reference-based pairwise objectives against float64 numpy formulas, identities and TRL."""

import types

import numpy as np
import pytest
import torch

from fastpref import objectives

RNG = np.random.default_rng(0)
LOGPS = RNG.uniform(-60.0, 0.0, (4, 64))
LENGTHS = RNG.integers(1, 40, (2, 64))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def evaluate(function, *, lengths=None, **hyperparameters):
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


@pytest.mark.parametrize(
    ("loss_type", "name", "hyperparameters"),
    [
        ("sigmoid", "dpo", {"label_smoothing": 0.1}),
        ("hinge", "hinge", {}),
        ("ipo", "ipo", {"normalize": "sum"}),
    ],
)
def test_agrees_with_trl(loss_type, name, hyperparameters):
    """TRL's reference-free CPO loss has the same terms; a uniform reference makes them ours."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    settings = types.SimpleNamespace(
        alpha=0.0,
        beta=0.2,
        loss_type=loss_type,
        label_smoothing=hyperparameters.get("label_smoothing", 0.0),
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    chosen, rejected = torch.tensor(LOGPS[:2])
    theirs = cpo.CPOTrainer.cpo_loss(settings, chosen, rejected)
    zeros = torch.zeros_like(chosen)
    ours = objectives.get(name, beta=0.2, **hyperparameters)(chosen, rejected, zeros, zeros)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
