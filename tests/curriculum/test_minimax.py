# SPDX-License-Identifier: Apache-2.0
"""Programs and tests against a search in plain Python over all matrices of a size."""

import itertools

import pytest
import torch

from fastpref.curriculum import minimax_pairs


def by_hand(matrix):
    rows = [sum(row) for row in matrix]
    cols = [sum(col) for col in zip(*matrix, strict=True)]
    if max(rows) == min(rows):
        return (-1, -1, -1, -1)
    best, worst = rows.index(max(rows)), rows.index(min(rows))
    passed = [col for col in range(len(cols)) if matrix[best][col]]
    failed = [col for col in range(len(cols)) if not matrix[worst][col]]
    return (best, worst, max(passed, key=lambda c: cols[c]), min(failed, key=lambda c: cols[c]))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 4), (3, 3)])
def test_every_matrix(shape):
    rows, cols = shape
    matrices = [
        [list(cells[r * cols : (r + 1) * cols]) for r in range(rows)]
        for cells in itertools.product([0, 1], repeat=rows * cols)
    ]
    got = minimax_pairs(torch.tensor(matrices))
    assert list(zip(*(one.tolist() for one in got), strict=True)) == [by_hand(m) for m in matrices]


def test_one_matrix():
    got = minimax_pairs(torch.tensor([[True, True, False], [False, False, False]]))
    assert [int(one) for one in got] == [0, 1, 0, 2]
    assert all(one.dim() == 0 for one in got)


@pytest.mark.parametrize(
    ("passes", "error", "message"),
    [
        ([[1]], TypeError, "passes must be a torch.Tensor"),
        (torch.ones(2, 2), TypeError, "passes must be bool or integer"),
        (torch.ones(2).bool(), ValueError, r"\(\.\.\., programs, tests\), got \(2,\)"),
        (torch.ones(2, 0).bool(), ValueError, r"got \(2, 0\)"),
    ],
)
def test_bad_use(passes, error, message):
    with pytest.raises(error, match=message):
        minimax_pairs(passes)
