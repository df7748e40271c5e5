# SPDX-License-Identifier: Apache-2.0
"""Reference-free pairwise objectives against float64 numpy formulas, identities and TRL."""

import types

import numpy as np
import pytest
import torch

from fastpref import objectives

RNG = np.random.default_rng(1)
LOGPS = RNG.uniform(-60.0, 0.0, (2, 64))
LENGTHS = RNG.integers(1, 40, (2, 64))


def inputs(lengths=LENGTHS):
    logps = [torch.tensor(row, requires_grad=True) for row in LOGPS]
    return logps, {
        "chosen_lengths": torch.tensor(lengths[0]),
        "rejected_lengths": torch.tensor(lengths[1]),
    }


@pytest.mark.parametrize(("beta", "gamma", "eps"), [(2.5, 1.0, 0.0), (10.0, 0.0, 0.1)])
def test_simpo(beta, gamma, eps):
    logps, lengths = inputs()
    result = objectives.simpo(*logps, **lengths, beta=beta, gamma=gamma, label_smoothing=eps)
    gradients = torch.autograd.grad(result.losses.sum(), logps)
    mean = LOGPS / LENGTHS
    m = beta * (mean[0] - mean[1]) - gamma
    losses = (1 - eps) * np.logaddexp(0, -m) + eps * np.logaddexp(0, m)
    slope = beta * (-1 / (1 + np.exp(m)) + eps)
    expected = (losses, *(beta * mean), slope / LENGTHS[0], -slope / LENGTHS[1])
    for got, value in zip((*result, *gradients), expected, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), value, rtol=1e-9, atol=1e-9)


def test_simpo_of_single_tokens_without_margin_is_dpo_on_zeros():
    logps, _ = inputs()
    ones = torch.ones(64, dtype=torch.int64)
    zeros = torch.zeros(64)
    ours = objectives.simpo(*logps, chosen_lengths=ones, rejected_lengths=ones, beta=0.7, gamma=0)
    torch.testing.assert_close(ours.losses, objectives.dpo(*logps, zeros, zeros, beta=0.7).losses)


def test_simpo_takes_an_empty_response_as_zero():
    lengths = LENGTHS.copy()
    lengths[1, :8] = 0
    logps, lengths = inputs(lengths)
    result = objectives.simpo(*logps, **lengths)
    m = 2.5 * LOGPS[0, :8] / LENGTHS[0, :8] - 1
    np.testing.assert_allclose(result.losses[:8].detach(), np.logaddexp(0, -m), rtol=1e-9)
    assert (result.rejected_rewards[:8] == 0).all()
    gradient = torch.autograd.grad(result.losses.sum(), logps[1])[0]
    assert (gradient[:8] == 0).all() and (gradient[8:] != 0).all()


def test_simpo_agrees_with_trl():
    cpo = pytest.importorskip("trl.experimental.cpo")
    settings = types.SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        loss_type="simpo",
        simpo_gamma=0.8,
        label_smoothing=0.1,
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    means = torch.tensor(LOGPS / LENGTHS)
    theirs = cpo.CPOTrainer.cpo_loss(settings, *means)
    logps, lengths = inputs()
    ours = objectives.simpo(*logps, **lengths, beta=2.0, gamma=0.8, label_smoothing=0.1)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_sft_is_the_mean_nll_of_the_chosen_response():
    logps, lengths = inputs()
    result = objectives.sft(*logps, chosen_lengths=lengths["chosen_lengths"])
    np.testing.assert_allclose(result.losses.detach(), -LOGPS[0] / LENGTHS[0], rtol=1e-12)
    chosen, rejected = torch.autograd.grad(result.losses.sum(), logps, allow_unused=True)
    np.testing.assert_allclose(chosen, -1 / LENGTHS[0], rtol=1e-12)
    assert rejected is None
    np.testing.assert_array_equal(result.chosen_rewards, LOGPS[0])
    np.testing.assert_array_equal(result.rejected_rewards, LOGPS[1])


def test_sft_takes_a_given_nll_with_its_gradient():
    logps, _ = inputs()
    nll = torch.rand(64, dtype=torch.float64, requires_grad=True)
    losses = objectives.sft(*logps, chosen_nll=nll).losses
    assert torch.equal(losses, nll)
    assert torch.equal(torch.autograd.grad(losses.sum(), nll)[0], torch.ones_like(nll))


def test_sft_needs_lengths_or_nll():
    with pytest.raises(ValueError, match="chosen_lengths"):
        objectives.sft(*inputs()[0])
