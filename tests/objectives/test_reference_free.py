# SPDX-License-Identifier: Apache-2.0
"""Reference-free pairwise objectives against float64 numpy formulas, identities and TRL."""

import math
import types

import mpmath
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


def trl_cpo_loss(*scores, beta, **settings):
    """TRL's own, on sums for loss_type "sigmoid" and on means for "simpo"."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    defaults = {"alpha": 0.0, "label_smoothing": 0.0}
    accelerator = types.SimpleNamespace(device="cpu")
    trainer = types.SimpleNamespace(beta=beta, accelerator=accelerator, **defaults | settings)
    return cpo.CPOTrainer.cpo_loss(trainer, *scores)


def close(actual, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-9}
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_simpo_agrees_with_trl():
    means = torch.tensor(LOGPS / LENGTHS)
    settings = {"loss_type": "simpo", "simpo_gamma": 0.8, "label_smoothing": 0.1}
    logps, lengths = inputs()
    ours = objectives.simpo(*logps, **lengths, beta=2.0, gamma=0.8, label_smoothing=0.1)
    close(ours, trl_cpo_loss(*means, beta=2.0, **settings))


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


def evaluate(function, logps=LOGPS, **keywords):
    """Losses, rewards and the gradients of the summed losses."""
    leaves = [torch.as_tensor(row).clone().requires_grad_() for row in logps]
    result = function(*leaves, **keywords)
    slopes = torch.autograd.grad(result.losses.sum(), leaves, materialize_grads=True)
    return [t.detach() for t in (*result, *slopes)]


COUNTS = inputs()[1]
MEANS = torch.tensor(LOGPS / LENGTHS)


def fp32(chosen, rejected):
    """One token in each response."""
    logps = [torch.tensor(chosen), torch.tensor(rejected)]
    ones = torch.ones(len(chosen))
    return logps, {"chosen_lengths": ones, "rejected_lengths": ones}


@pytest.mark.parametrize("alpha", [0.25, 0.1, -0.5])
def test_alpha_po_agrees_with_trl(alpha):
    ours = objectives.alpha_po(*torch.tensor(LOGPS), **COUNTS, alpha=alpha, beta=2.0, gamma=0.8)
    theirs = trl_cpo_loss(*MEANS, beta=2.0, alpha=alpha, loss_type="simpo", simpo_gamma=0.8)
    close(ours, theirs)


def test_alpha_po_becomes_simpo():
    simpo = evaluate(objectives.simpo, gamma=0.1, **COUNTS)
    close(evaluate(objectives.alpha_po, alpha=0.0, **COUNTS), simpo)
    for alpha in (1e-9, -1e-9, 1e-300):
        close(evaluate(objectives.alpha_po, alpha=alpha, **COUNTS), simpo, rtol=1e-6, atol=1e-6)
    fp32 = torch.tensor(LOGPS).float()
    simpo = evaluate(objectives.simpo, fp32, gamma=0.1, **COUNTS)
    close(evaluate(objectives.alpha_po, fp32, alpha=1e-40, **COUNTS), simpo, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [20.0, 0.01, 1e-3])
def test_alpha_po_of_improbable_responses_is_finite_and_not_flat(alpha):
    logps, ones = fp32([-1e4, -9e3, -1e4], [-9e3, -1e4, 0.0])
    losses, *rewards, d_chosen, _ = evaluate(objectives.alpha_po, logps, **ones, alpha=alpha)
    assert all(torch.isfinite(value).all() for value in (losses, d_chosen, *rewards))
    assert rewards[0][0] < rewards[0][1] and rewards[0][0] < rewards[1][0]
    assert d_chosen[0] < -1 and d_chosen[2] < -1 and losses[0] > 1


def test_cpo_agrees_with_trl():
    logps = torch.tensor(LOGPS)
    theirs = trl_cpo_loss(*logps, beta=0.2, loss_type="sigmoid", label_smoothing=0.1)
    cpo = objectives.get("cpo", beta=0.2, label_smoothing=0.1, sft_weight=0.0)
    close(cpo(*logps), theirs)
    nll = torch.rand(64, dtype=torch.float64)
    with_sft = cpo.replace(sft_weight=0.7)(*logps, chosen_nll=nll)
    close(with_sft, (theirs[0] + 0.7 * nll, *theirs[1:]))


def test_cpo_is_dpo_on_zeros_and_sft():
    zeros = torch.zeros(2, 64)
    dpo = evaluate(objectives.dpo, [*LOGPS, *zeros], beta=0.3)
    close(evaluate(objectives.cpo, beta=0.3, sft_weight=0.0), dpo[:5])
    cpo = evaluate(objectives.cpo, beta=0.3, chosen_lengths=COUNTS["chosen_lengths"])
    torch.testing.assert_close(cpo[0], dpo[0] - MEANS[0])
    torch.testing.assert_close(cpo[3], dpo[3] - torch.tensor(1 / LENGTHS[0]))


@pytest.mark.parametrize("name", ["cpo", "slic", "orpo", "asft"])
def test_sft_term_takes_a_given_nll_with_its_gradient(name):
    logps, lengths = inputs()
    nll = torch.rand(64, dtype=torch.float64, requires_grad=True)
    extras = lengths if name in ("orpo", "asft") else {}
    objective = objectives.get(name, sft_weight=0.7)
    losses = objective(*logps, **extras, chosen_nll=nll).losses
    without = objective.replace(sft_weight=0.0)(*logps, **extras).losses
    torch.testing.assert_close(losses - without, 0.7 * nll)
    assert torch.equal(torch.autograd.grad(losses.sum(), nll)[0], torch.full_like(nll, 0.7))


@pytest.mark.parametrize("name", ["cpo", "slic"])
def test_sft_term_needs_lengths_or_nll(name):
    with pytest.raises(ValueError, match="chosen_lengths"):
        getattr(objectives, name)(*inputs()[0])


def test_orpo_agrees_with_trl(monkeypatch):
    # TRL computes it in float32, whatever comes.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = types.SimpleNamespace(beta=0.2, accelerator=types.SimpleNamespace(device="cpu"))
    theirs = orpo.ORPOTrainer.odds_ratio_loss(trainer, *MEANS)[:3]  # the sign comes later
    ours = objectives.orpo(*torch.tensor(LOGPS), **COUNTS, beta=0.2, sft_weight=0.0)
    close(ours, [-theirs[0], theirs[1], theirs[2]], rtol=1e-9, atol=1e-9)


def log_odds(mean):
    mean = mpmath.mpf(float(mean))
    return mean - mpmath.log1p(-mpmath.exp(mean))


def test_orpo_compares_log_odds():
    chosen = -torch.logspace(-6, 2, 9, dtype=torch.float64)
    rejected = chosen.roll(4)
    ones = {"chosen_lengths": torch.ones(9), "rejected_lengths": torch.ones(9)}
    losses = objectives.orpo(chosen, rejected, **ones, beta=1.0, sft_weight=0.0).losses
    for got, better, worse in zip(losses, chosen, rejected, strict=True):
        with mpmath.workdps(40):
            exact = mpmath.log1p(mpmath.exp(log_odds(worse) - log_odds(better)))
        assert got.item() == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_asft_is_never_below_orpo(beta):
    asft = objectives.asft(*torch.tensor(LOGPS), **COUNTS, beta=beta).losses
    assert (asft > objectives.orpo(*torch.tensor(LOGPS), **COUNTS, beta=beta).losses).all()


def test_asft_raises_chosen_and_lowers_rejected_likelihood():
    losses, *_, d_chosen, d_rejected = evaluate(objectives.asft, **COUNTS, beta=0.3)
    odds = [MEANS[i] - torch.log1p(-torch.exp(MEANS[i])) for i in range(2)]
    aligned = torch.log1p(torch.exp(-odds[0])) + torch.log1p(torch.exp(odds[1]))
    torch.testing.assert_close(losses, -MEANS[0] + 0.3 * aligned)
    counts = torch.tensor(LENGTHS).double()
    torch.testing.assert_close(d_chosen, -1.3 / counts[0])
    torch.testing.assert_close(d_rejected, 0.3 / torch.expm1(-MEANS[1]) / counts[1])


@pytest.mark.parametrize("name", ["orpo", "asft"])
def test_a_sure_response_has_a_finite_loss_and_slope(name):
    logps, ones = fp32([0.0, -1e-8, -1e-6, -1e4], [-1e4, -1e-6, -1e-8, 0.0])
    results = evaluate(getattr(objectives, name), logps, **ones)
    assert all(torch.isfinite(value).all() for value in results)


@pytest.mark.parametrize("name", ["alpha_po", "orpo", "asft", "simper", "amapo"])
def test_an_empty_response_has_mean_zero_and_no_slope(name):
    counts = {
        "chosen_lengths": torch.tensor([0, 2, 0]),
        "rejected_lengths": torch.tensor([3, 0, 0]),
    }
    logps = torch.tensor([[-4.0, -5.0, -6.0], [-7.0, -8.0, -9.0]])
    losses, *rewards, d_chosen, d_rejected = evaluate(getattr(objectives, name), logps, **counts)
    assert torch.isfinite(losses).all()
    assert rewards[0][0] == rewards[0][2] == rewards[1][1] == rewards[1][2] == 0
    assert d_chosen[0] == d_chosen[2] == d_rejected[1] == d_rejected[2] == 0
    assert d_chosen[1] < 0 < d_rejected[0]


def test_simper_is_a_difference_of_inverse_perplexities():
    losses, *rewards, d_chosen, d_rejected = evaluate(objectives.simper, **COUNTS)
    inverse = torch.exp(MEANS)
    counts = torch.tensor(LENGTHS).double()
    close([losses, *rewards], [inverse[1] - inverse[0], *MEANS])
    close([d_chosen, d_rejected], [-inverse[0] / counts[0], inverse[1] / counts[1]])


def test_slic_is_a_hinge_on_sums():
    zeros = torch.zeros(2, 64)
    slic = evaluate(objectives.slic, sft_weight=0.0)
    close(slic, evaluate(objectives.hinge, [*LOGPS, *zeros], beta=1.0)[:5])
    wide = objectives.slic(*torch.tensor(LOGPS), delta=100.0, sft_weight=0.0).losses
    torch.testing.assert_close(wide, torch.tensor(100 - LOGPS[0] + LOGPS[1]))


def test_amapo_gives_a_margin_to_pairs_below_the_mean():
    amapo = evaluate(objectives.amapo, beta=2.0, label_smoothing=0.1, **COUNTS)
    gap = MEANS[0] - MEANS[1]
    mean, std = gap.mean().item(), gap.std().item()
    margins = [2 * math.exp(mean * (mean - d) / std) if d < mean else 0.0 for d in gap.tolist()]
    assert 0 < margins.count(0.0) < 64
    for i, margin in enumerate(margins):
        lengths = {key: value[i : i + 1] for key, value in COUNTS.items()}
        settings = {"beta": 2.0, "gamma": margin, "label_smoothing": 0.1}
        simpo = evaluate(objectives.simpo, LOGPS[:, i : i + 1], **settings, **lengths)
        close([value[i : i + 1] for value in amapo], simpo)


@pytest.mark.parametrize("pairs", [1, 3, 7])
@pytest.mark.parametrize("gap", [0.1, 0.7, -1e3 / 3])
def test_amapo_of_equal_gaps_is_simpo(pairs, gap):
    logps, ones = fp32([min(gap, 0.0)] * pairs, [min(-gap, 0.0)] * pairs)
    amapo, simpo = objectives.amapo(*logps, **ones), objectives.simpo(*logps, **ones, gamma=0.0)
    assert torch.equal(amapo.losses, simpo.losses)


def test_amapo_of_one_pair_far_below_a_large_mean():
    logps, ones = fp32([-1e4] + [0.0] * 7, [0.0] + [-1e4] * 7)
    losses, *_, d_chosen, d_rejected = evaluate(objectives.amapo, logps, **ones)
    assert torch.isfinite(losses).all()
    assert d_chosen[0] == -2.5 == -d_rejected[0]
