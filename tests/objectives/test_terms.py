# SPDX-License-Identifier: Apache-2.0
"""The shared terms, at the places where a naive form fails."""

import mpmath
import numpy as np
import torch

from fastpref.objectives import terms


def test_softplus_is_exact_in_fp64_on_both_sides():
    x = torch.linspace(-800, 800, 4001, dtype=torch.float64, requires_grad=True)
    y = terms.softplus(x)
    expected = np.logaddexp(0, x.detach().numpy())
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-14, atol=1e-300)
    slope = np.exp(-np.logaddexp(0, -x.detach().numpy()))
    np.testing.assert_allclose(torch.autograd.grad(y.sum(), x)[0], slope, rtol=1e-13, atol=1e-300)


def test_bradley_terry_nll_mixes_both_labels():
    m = torch.linspace(-30, 30, 601, dtype=torch.float64)
    expected = 0.8 * np.logaddexp(0, -m.numpy()) + 0.2 * np.logaddexp(0, m.numpy())
    np.testing.assert_allclose(terms.bradley_terry_nll(m, 0.2), expected, rtol=1e-12)


def test_per_token_is_zero_for_an_empty_response():
    total = torch.tensor([-6.0, 5.0, float("nan")], requires_grad=True)
    mean = terms.per_token(total, torch.tensor([3, 0, 0]))
    assert mean.tolist() == [-2.0, 0.0, 0.0]
    gradient = torch.autograd.grad(mean.sum(), total)[0]
    assert gradient.tolist() == [torch.tensor(1 / 3).item(), 0.0, 0.0]


def test_log1mexp_keeps_its_digits_and_its_slope():
    x = -torch.logspace(-12, 3, 400, dtype=torch.float64)
    x.requires_grad_()
    y = terms.log1mexp(x)
    with mpmath.workdps(50):
        exact = [float(mpmath.log1p(-mpmath.exp(mpmath.mpf(v)))) for v in x.tolist()]
    np.testing.assert_allclose(y.detach(), exact, rtol=1e-13)
    slope = -1 / np.expm1(-x.detach().numpy())
    np.testing.assert_allclose(torch.autograd.grad(y.sum(), x)[0], slope, rtol=1e-12)
