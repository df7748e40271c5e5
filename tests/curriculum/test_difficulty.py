# SPDX-License-Identifier: Apache-2.0
"""Votes on difficulty by hand, and MADPO's weights by its formula in plain numbers."""

import math
from statistics import NormalDist, fmean, pstdev

import pytest
import torch

from fastpref.curriculum import margin_weights, vote_difficulty
from fastpref.objectives import madpo


def test_votes_by_hand():
    gaps = [[3.0, -1.0, 0.5, 0.0], [10.0, 20.0, -5.0, 40.0], [2.0, 2.0, 2.0, 2.0]]
    votes, right = [], []
    for row in gaps:
        mean, std = fmean(row), pstdev(row)
        votes.append([NormalDist().cdf((one - mean) / std) if std else 0.5 for one in row])
        right.append(fmean([1.0 if one > 0 else 0.5 if one == 0 else 0.0 for one in row]))
    weights = [one / sum(right) for one in right]
    want = [1 - sum(w * v[p] for w, v in zip(weights, votes, strict=True)) for p in range(4)]
    got = vote_difficulty(torch.tensor(gaps, dtype=torch.float64))
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_each_scorer_by_its_own_distribution():
    """Neither its scale nor its offset counts, but for which pairs it ranks right."""
    gaps = torch.rand(2, 50) + 0.1
    scaled = gaps * torch.tensor([[100.0], [0.01]])
    torch.testing.assert_close(vote_difficulty(scaled), vote_difficulty(gaps))
    easy = vote_difficulty(gaps[:1])
    assert (easy.argsort() == gaps[0].argsort(descending=True)).all()


def test_scorers_that_are_never_right():
    got = vote_difficulty(-torch.rand(2, 5) - 0.1)
    assert got.isfinite().all() and 0.3 < got.mean() < 0.7
    assert vote_difficulty(torch.ones(3, 0)).shape == (0,)


def test_margin_weights():
    margins = [-5.0, -1.9, -0.3, 0.0, 0.4, 2.0, 7.0]
    c_min, c_max, slope, tau = 0.4, 3.0, 1.5, 2.5

    def weight(h):
        if h <= -tau:
            return 1.0
        power = math.exp(slope * (abs(h) - tau))
        c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * power)
        return (1 + math.exp(-h)) / (1 + math.exp(-c * h))

    given = torch.tensor(margins, dtype=torch.float64)
    options = {"c_min": c_min, "c_max": c_max, "slope": slope, "tau": tau}
    got = margin_weights(given, **options)
    assert got.tolist() == pytest.approx([weight(h) for h in margins], rel=1e-12)
    zeros = torch.zeros(7, dtype=torch.float64)
    losses = madpo(zeros, zeros, zeros, zeros, reward_margin=given, **options).losses
    torch.testing.assert_close(losses, got * math.log(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vote_difficulty(torch.ones(3)), r"scores must be \(M, P\), got \(3,\)"),
        (lambda: vote_difficulty(torch.ones(0, 3)), "scores must be of at least one scorer"),
        (lambda: margin_weights(torch.ones(2), c_min=0.0), r"c_min must be in \(0, 1\]"),
        (lambda: margin_weights(torch.ones(2), c_max=0.5), r"c_max must be in \[1, inf\]"),
        (lambda: margin_weights(torch.ones(2), tau=math.inf), "tau must be in"),
    ],
)
def test_bad_use(call, message):
    with pytest.raises(ValueError, match=message):
        call()
