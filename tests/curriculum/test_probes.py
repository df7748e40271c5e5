# SPDX-License-Identifier: Apache-2.0
"""Closed forms against the fits they stand for: each row left out in turn, each fold by itself."""

import math

import pytest
import torch

from fastpref.curriculum import ridge_difficulty, separability, singular_kernel_scores


def fit(train, labels, test, strength):
    """Ridge regression with an intercept that is not penalised, from its normal equations."""
    ones = torch.ones(len(train), 1, dtype=torch.float64)
    wide = torch.cat([train, ones], 1)
    penalty = strength * torch.eye(wide.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    weights = torch.linalg.solve(wide.T @ wide + penalty, wide.T @ labels)
    return test @ weights[:-1] + weights[-1]


@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("columns", [None, 2])
def test_ridge_leaves_each_row_out(width, columns):
    features = torch.randn(12, width, dtype=torch.float64)
    targets = torch.randn(12, *([columns] if columns else []), dtype=torch.float64)
    got = ridge_difficulty(features, targets, ridge=0.05)
    strength = 0.05 * (features - features.mean(0)).square().sum(1).mean()
    flat = targets.reshape(12, -1)
    for row in range(12):
        kept = torch.arange(12) != row
        guess = fit(features[kept], flat[kept], features[row], strength)
        torch.testing.assert_close(got[row], (flat[row] - guess).norm(), rtol=1e-8, atol=1e-10)


def test_ridge_finds_the_hard_rows():
    features = torch.randn(60, 5)
    targets = features @ torch.randn(5)
    targets[7] += 10
    got = ridge_difficulty(features, targets)
    assert got.dtype == torch.float32 and int(got.argmax()) == 7
    flat = ridge_difficulty(torch.ones(4, 3), torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert flat.tolist() == pytest.approx([abs(y - (12 - y) / 3) for y in (1, 2, 3, 6)])


@pytest.mark.parametrize("width", [4, 30])
def test_separability_by_folds(width):
    torch.manual_seed(1)
    chosen = torch.randn(11, width, dtype=torch.float64) + 0.5
    rejected = torch.randn(11, width, dtype=torch.float64)
    report = separability(chosen, rejected, folds=11, ridge=0.1)  # each pair by itself
    right = []
    for pair in range(11):
        kept = torch.arange(11) != pair
        train = torch.cat([chosen[kept], rejected[kept]])
        labels = torch.cat([torch.ones(10), -torch.ones(10)]).double()[:, None]
        strength = 0.1 * (train - train.mean(0)).square().sum(1).mean()
        test = torch.stack([chosen[pair], rejected[pair]])
        good, bad = fit(train, labels, test, strength)[:, 0].tolist()
        assert float(report.chosen_scores[pair]) == pytest.approx(good, abs=1e-9)
        assert float(report.rejected_scores[pair]) == pytest.approx(bad, abs=1e-9)
        right.append((good > 0, bad < 0, good > bad))
    assert report.accuracy == pytest.approx(sum(a + b for a, b, _ in right) / 22)
    assert report.pair_accuracy == pytest.approx(sum(c for *_, c in right) / 11)
    wins = [
        float(a > b) + 0.5 * float(a == b)
        for a in report.chosen_scores
        for b in report.rejected_scores
    ]
    assert report.auc == pytest.approx(sum(wins) / 121)
    assert report.standard_error == pytest.approx(math.sqrt(0.25 / 22))


def test_pairs_of_two_sources_and_of_one():
    one, other = torch.randn(2, 200, 16)
    apart = separability(one + 1.0, other - 1.0)
    alike = separability(one, other)
    assert apart.accuracy > 0.95 and apart.auc > 0.99
    assert abs(alike.accuracy - 0.5) < 4 * alike.standard_error


def test_a_separability_of_nothing():
    report = separability(torch.ones(6, 3), torch.ones(6, 3))
    assert report.accuracy == report.auc == report.pair_accuracy == 0.5


@pytest.mark.parametrize("power", [None, 0.5, 4.0])
def test_singular_kernel_by_hand(power):
    features = torch.randn(9, 4, dtype=torch.float64)
    labels = torch.tensor([1, -1, 1, 1, -1, -1, 1, -1, 1])
    got = singular_kernel_scores(features, labels, power=power)
    exponent = 3 if power is None else power
    unit = features / features.norm(dim=1, keepdim=True)
    for i in range(9):
        kernel = [
            float((unit[i] - unit[j]).norm()) ** -exponent if j != i else 0.0 for j in range(9)
        ]
        want = sum(k * int(y) for k, y in zip(kernel, labels, strict=True)) / sum(kernel)
        assert float(got[i]) == pytest.approx(want, rel=1e-9)


def test_singular_kernel_at_its_ends():
    """Of rows that coincide, those alone count; a great power takes the nearest row."""
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 1.0]])
    labels = torch.tensor([1, 1, -1, 1, -1])
    got = singular_kernel_scores(features, labels, power=5000.0)
    assert got[:2].tolist() == [1.0, 1.0]
    assert got[2:4].tolist() == pytest.approx([1.0, -1.0])
    wide = torch.randn(300, 2000)
    assert singular_kernel_scores(wide, torch.randint(2, (300,)) * 2 - 1).isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ridge_difficulty(torch.ones(3, 2), torch.ones(2)), ValueError, "of N = 3 rows"),
        (lambda: ridge_difficulty(torch.ones(3), torch.ones(3)), ValueError, "features must be"),
        (lambda: ridge_difficulty(torch.ones(1, 2), torch.ones(1)), ValueError, "at least 2 rows"),
        (lambda: ridge_difficulty(torch.ones(3, 2), [1.0]), TypeError, "targets must be a torch"),
        (
            lambda: ridge_difficulty(torch.ones(3, 2), torch.ones(3), ridge=0.0),
            ValueError,
            r"ridge must be in \(0, inf\]",
        ),
        (
            lambda: separability(torch.ones(3, 2), torch.ones(2, 2)),
            ValueError,
            "shaped like chosen",
        ),
        (
            lambda: separability(torch.ones(3, 2), torch.ones(3, 2)),
            ValueError,
            "at most the 3 pairs",
        ),
        (
            lambda: singular_kernel_scores(torch.ones(2, 2), torch.tensor([0, 1])),
            ValueError,
            r"labels must be 1 or -1, got \[0, 1\]",
        ),
        (
            lambda: singular_kernel_scores(torch.zeros(2, 2), torch.tensor([1, 1])),
            ValueError,
            "features must be nonzero, got row 0",
        ),
    ],
)
def test_bad_use(call, error, message):
    with pytest.raises(error, match=message):
        call()
