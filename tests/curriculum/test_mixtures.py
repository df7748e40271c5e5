# SPDX-License-Identifier: Apache-2.0
"""Mixtures that are known are found again, and what comes without scikit-learn."""

import sys

import pytest
import torch

from fastpref.curriculum import mixture_weights


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [0, 1])
def test_a_known_mixture(seed):
    """With rows of one component alone, the factorisation is the only one."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    torch.manual_seed(seed)
    domains = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.1, 0.1, 0.8], [0.1, 0.1, 0.7, 0.1]])
    weights = torch.cat([torch.eye(3).repeat_interleave(20, 0), torch.rand(60, 3) ** 2])
    weights = (weights / weights.sum(1, keepdim=True)).double()
    weights[:, 0] *= torch.linspace(1, 1.5, len(weights))  # so that the largest is known
    weights = weights / weights.sum(1, keepdim=True)
    got = mixture_weights((weights @ domains.double()).float(), 3)
    found = [int((got.domains[k] - domains).abs().sum(1).argmin()) for k in range(3)]
    assert sorted(found) == [0, 1, 2]
    torch.testing.assert_close(got.domains, domains[found].double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(got.weights, weights[:, found], rtol=0, atol=5e-3)
    torch.testing.assert_close(got.weights.sum(1), torch.ones(120).double())
    assert got.weights.sum(0).tolist() == sorted(got.weights.sum(0).tolist(), reverse=True)


def test_weights_are_of_components_that_sum_to_one(monkeypatch):
    """However the factorisation shares its scale among the two factors."""
    weights = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    domains = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    scale = torch.tensor([4.0, 0.5], dtype=torch.float64)
    factors = weights / scale, domains * scale[:, None]
    monkeypatch.setattr("fastpref.curriculum.mixtures._factorise", lambda rows, count: factors)
    got = mixture_weights(weights @ domains, 2)
    torch.testing.assert_close(got.weights, weights)
    torch.testing.assert_close(got.domains, domains)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ImportError, match=r"fastpref\[curriculum\]"):
        mixture_weights(torch.full((4, 2), 0.5), 1)


@pytest.mark.parametrize(
    ("rows", "components", "message"),
    [
        (torch.ones(4, 2), 1, "sum to 1 in each row, got sums from 2 to 2"),
        (torch.tensor([[1.5, -0.5]]), 1, "the least -0.5"),
        (torch.full((4, 2), 0.5), 3, r"components must be at most 2, of \(4, 2\)"),
        (torch.full((4, 2), 0.5), 0, "components must be at least 1"),
    ],
)
def test_bad_use(rows, components, message):
    with pytest.raises(ValueError, match=message):
        mixture_weights(rows, components)
