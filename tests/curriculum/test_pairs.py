# SPDX-License-Identifier: Apache-2.0
"""Pairs of ranked lists and filters, against loops over lists in Python."""

import itertools
import random

import pytest
import torch

from fastpref.curriculum import clear_margin, ranked_pairs, top_fraction


def by_hand(scores, mask, pairing, min_gap):
    found = []
    for g, (row, there) in enumerate(zip(scores, mask, strict=True)):
        places = sorted((k for k in range(len(row)) if there[k]), key=lambda k: (-row[k], k))
        if pairing == "best_vs_rest":
            pairs = [(places[0], other) for other in places[1:]]
        elif pairing == "adjacent":
            pairs = list(itertools.pairwise(places))
        elif pairing == "best_vs_worst":
            pairs = [(places[0], places[-1])] if places else []
        else:
            pairs = list(itertools.combinations(places, 2))
        for w, r in pairs:
            gap = row[w] - row[r]
            if gap > 0 and gap >= min_gap:
                found.append((g * len(row) + w, g * len(row) + r, gap))
    return sorted(found, key=lambda one: -one[2])


@pytest.mark.parametrize("pairing", ["best_vs_rest", "all", "adjacent", "best_vs_worst"])
@pytest.mark.parametrize("min_gap", [0.0, 2.0])
def test_as_by_hand(pairing, min_gap):
    """With ties, holes and lists of one and none."""
    generator = random.Random(1)
    for size in (1, 2, 4, 5):
        scores = [[float(generator.randrange(6)) for _ in range(size)] for _ in range(9)]
        mask = [[generator.random() < 0.7 for _ in range(size)] for _ in range(9)]
        mask[0] = [False] * size
        given = torch.tensor(scores)
        given[~torch.tensor(mask)] = float("nan")  # never looked at
        got = ranked_pairs(given, mask=torch.tensor(mask), pairing=pairing, min_gap=min_gap)
        want = by_hand(scores, mask, pairing, min_gap)
        assert list(zip(*(one.tolist() for one in got), strict=True)) == want
        assert got.chosen_index.dtype == got.rejected_index.dtype == torch.int64


def test_curry_dpo():
    """The easiest pair has the widest gap; rows are those of the flattened lists."""
    got = ranked_pairs(torch.tensor([[1.0, 9.0, 5.0, 8.0], [0.0, 1.0, 4.0, 2.0]]))
    assert got.chosen_index.tolist() == [1, 1, 6, 6, 6, 1]
    assert got.rejected_index.tolist() == [0, 2, 4, 5, 7, 3]
    assert got.gap.tolist() == [8.0, 4.0, 4.0, 3.0, 2.0, 1.0]


def test_no_lists():
    for shape in ((0, 3), (2, 0), (0, 0)):
        for pairing in ("best_vs_rest", "all", "adjacent", "best_vs_worst"):
            got = ranked_pairs(torch.zeros(shape), pairing=pairing)
            assert [one.shape for one in got] == [(0,)] * 3


def test_clear_margin():
    chosen = torch.tensor([6.0, 6.0, 5.0, 5.0, 4.0, 6.0])
    rejected = torch.tensor([4.0, 5.0, 3.5, 4.0, 1.0, 5.5])
    own = torch.tensor([0, 1, 0, 1, 0, 1])
    assert clear_margin(chosen, rejected, own=own).tolist() == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert clear_margin(chosen, rejected).tolist() == [True] + [False] * 5
    loose = clear_margin(chosen, rejected, min_chosen=0.0, min_gap=1.5)
    assert loose.tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("size", [1, 12, 30])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 1.0])
def test_top_fraction(size, fraction):
    values = torch.randn(size).round(decimals=1)  # with ties
    for largest in (True, False):
        keep = top_fraction(values, fraction, largest=largest)
        count = max(1, int(fraction * size + 0.5))
        sign = -1 if largest else 1
        order = sorted(range(size), key=lambda i: (sign * values[i].item(), i))[:count]
        assert keep.nonzero()[:, 0].tolist() == sorted(order)
    assert top_fraction(values[:0], fraction).tolist() == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ranked_pairs([[1.0]]), TypeError, "scores must be a torch.Tensor, got list"),
        (lambda: ranked_pairs(torch.ones(3)), ValueError, r"scores must be \(G, K\), got \(3,\)"),
        (lambda: ranked_pairs(torch.tensor([[1.0, float("nan")]])), ValueError, r"NaN.*\(0, 1\)"),
        (
            lambda: ranked_pairs(torch.ones(1, 2), pairing="best vs rest"),
            ValueError,
            "pairing must be one of .*did you mean 'best_vs_rest'",
        ),
        (
            lambda: ranked_pairs(torch.ones(1, 2), mask=torch.ones(1, 2)),
            TypeError,
            "mask must be bool or integer, got torch.float32",
        ),
        (
            lambda: ranked_pairs(torch.ones(1, 2), mask=torch.ones(2, 2).bool()),
            ValueError,
            r"mask must be shaped like scores, \(1, 2\)",
        ),
        (lambda: ranked_pairs(torch.ones(1, 2), min_gap=-1.0), ValueError, "min_gap must be in"),
        (lambda: top_fraction(torch.ones(2), 0.0), ValueError, r"fraction must be in \(0, 1\]"),
        (lambda: top_fraction(torch.ones(2), "1"), TypeError, "fraction must be a number, got str"),
        (
            lambda: clear_margin(torch.ones(2), torch.ones(3)),
            ValueError,
            "rejected_scores must be shaped like chosen_scores",
        ),
    ],
)
def test_bad_use(call, error, message):
    with pytest.raises(error, match=message):
        call()
