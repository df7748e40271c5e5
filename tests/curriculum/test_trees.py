# SPDX-License-Identifier: Apache-2.0
"""Step pairs and step rewards against loops over nodes, rows and steps."""

import random

import pytest
import torch

from fastpref.curriculum import step_rewards, tree_steps
from fastpref.sequences import step_weights


def test_tree_by_hand():
    generator = random.Random(2)
    for size in (1, 2, 20, 60):
        # In any order: a parent may come after its children.
        shuffled = generator.sample(range(size), size)
        parents = [0] * size
        for place, node in enumerate(shuffled):
            parents[node] = shuffled[generator.randrange(place)] if place else -1
        values = [float(generator.randrange(4)) for _ in range(size)]
        want = []
        for node in range(size):
            children = [child for child in range(size) if parents[child] == node]
            if children and len({values[child] for child in children}) > 1:
                best = max(children, key=lambda child: (values[child], -child))
                worst = min(children, key=lambda child: (values[child], -child))
                want.append((node, best, worst, values[best], values[worst]))
        got = tree_steps(torch.tensor(parents), torch.tensor(values))
        assert list(zip(*(one.tolist() for one in got), strict=True)) == want


@pytest.mark.parametrize(
    ("parents", "values", "message"),
    [
        ([-1, 2], [0.0, 1.0], "below N = 2, got 2 for 1"),
        ([-1, 1], [0.0, 1.0], "other nodes below N = 2, got 1 for 1"),
        ([-1, 0], [0.0], "values must be shaped like parents"),
        ([-1.0, 0.0], [0.0, 1.0], "parents must be integers"),
    ],
)
def test_no_tree(parents, values, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tree_steps(torch.tensor(parents), torch.tensor(values))


def test_step_rewards_by_hand():
    hidden = torch.randn(4, 9, 5, dtype=torch.float64)
    step_ids = torch.tensor(
        [
            [-1, 0, 0, 1, 1, 1, 2, 2, -1],
            [-1, -1, 0, 1, 1, 2, 2, 2, 3],
            [0, 0, 0, 0, 2, 2, -1, -1, -1],  # without step 1
            [-1] * 9,
        ]
    )
    best = torch.tensor([0, 0, 1, 1])
    hidden[0, 0] = float("nan")  # of no step
    got = step_rewards(hidden, step_ids, best)
    assert got.shape == (4, 4)
    for row in range(4):
        for step in range(4):
            means = [hidden[one][step_ids[one] == step].mean(0) for one in (row, int(best[row]))]
            there = all((step_ids[one] == step).any() for one in (row, int(best[row])))
            want = 0.0
            if there:
                want = 1 + float(means[0] @ means[1] / means[0].norm() / means[1].norm())
            assert float(got[row, step]) == pytest.approx(want, rel=1e-12)
    assert got[0, :3].tolist() == pytest.approx([2.0, 2.0, 2.0])
    weights = step_weights(step_ids, got, step_ids >= 0)
    assert weights.sum(1).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])


def test_step_rewards_stay_within_their_range():
    """Of steps that are alike, and of opposite ones: step_weights refuses one below 0."""
    hidden = torch.randn(400, 1, 5)
    hidden[200:] = -hidden[:200]
    ids, best = torch.zeros(400, 1, dtype=torch.int64), torch.arange(200).repeat(2)
    got = step_rewards(hidden, ids, best)
    assert got.min() >= 0 and got.max() <= 2
    assert got[:200].min() > 1.99 and got[200:].max() < 0.01
    step_weights(ids, got, ids >= 0)


def test_no_step_at_all():
    got = step_rewards(torch.randn(2, 3, 4), torch.full((2, 3), -1), torch.tensor([0, 0]))
    assert got.shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.zeros(2, 3).long(), torch.zeros(2).long()), "hidden must be"),
        (
            (torch.ones(2, 3, 4), torch.zeros(2, 2).long(), torch.zeros(2).long()),
            "step_ids must be",
        ),
        ((torch.ones(2, 3, 4), torch.zeros(2, 3).long(), torch.tensor([0, 2])), "rows below B = 2"),
    ],
)
def test_bad_use(arguments, message):
    with pytest.raises(ValueError, match=message):
        step_rewards(*arguments)
