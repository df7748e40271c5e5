# SPDX-License-Identifier: Apache-2.0
"""Easy pairs come before hard ones, on every process the same, in accelerate's batches too."""

import pytest
import torch
from torch.utils.data import DataLoader

from fastpref.curriculum import StageSampler
from tests.ranks import started_by_torchrun

DIFFICULTY = torch.tensor([5.0, 1.0, 4.0, 1.0, 3.0, 2.0, 9.0, 0.0, 8.0, 7.0])
RANKED = [7, 1, 3, 5, 4, 2, 0, 9, 8, 6]


def test_in_the_order_of_difficulty():
    sampler = StageSampler(DIFFICULTY, 3, shuffle=False)
    assert list(sampler) == RANKED and len(sampler) == 10
    assert sampler.sizes == [4, 3, 3]


@pytest.mark.parametrize(("stages", "sizes"), [(3, [4, 3, 3]), ([2, 7, 1], [2, 7, 1]), (1, [10])])
def test_stages_are_shuffled_within(stages, sizes):
    sampler, other = StageSampler(DIFFICULTY, stages, seed=3), StageSampler(DIFFICULTY, stages)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)
        start = 0
        for size in sizes:
            assert sorted(order[start : start + size]) == sorted(RANKED[start : start + size])
            start += size
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] and list(other) != orders[0]


def test_last_steps():
    sampler = StageSampler(DIFFICULTY, 3)
    assert sampler.last_steps(1) == [4, 7, 10]
    assert sampler.last_steps(4) == [1, 2, 3]
    assert sampler.last_steps(3) == [2, 3, 4]


def test_nothing_depends_on_the_callers_random_numbers():
    first = list(StageSampler(DIFFICULTY, 2))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert list(StageSampler(DIFFICULTY, 2)) == first
    assert torch.equal(torch.get_rng_state(), before)


def batches_on_rank(rank, world, size):
    """Of two epochs."""
    with started_by_torchrun(rank, world):
        from accelerate import Accelerator

        torch.manual_seed(rank)  # the order must not follow from it
        sampler = StageSampler(DIFFICULTY, 5, seed=1)
        loader = DataLoader(range(10), batch_size=size, sampler=sampler)
        loader = Accelerator(cpu=True).prepare(loader)
        found = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            found.append([one.tolist() for one in loader])
        return found


def check_processes(ranks):
    """Step after step all of them together take what comes next in the order of one process; at
    the end accelerate fills up with the first."""
    for epoch in range(2):
        dealt = [
            one
            for step in zip(*(rank[epoch] for rank in ranks), strict=True)
            for batch in step
            for one in batch
        ]
        sampler = StageSampler(DIFFICULTY, 5, seed=1)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(dealt) >= 10 and dealt == (order + order)[: len(dealt)]
    assert ranks[0][0] != ranks[0][1]


@pytest.mark.heavy
@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_processes(two_ranks, size):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    check_processes(two_ranks(batches_on_rank, 2, size))


@pytest.mark.heavy
@pytest.mark.parametrize("size", [1, 3])
def test_four_processes(four_ranks, size):
    """Ten pairs are no multiple of what they take in a step."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    check_processes(four_ranks(batches_on_rank, 4, size))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3), 4), ValueError, "stages must be at most the 3 pairs, got 4"),
        ((torch.ones(3), 0), ValueError, "stages must be at least 1"),
        ((torch.ones(3), [1, 1]), ValueError, "sizes that sum to the 3 pairs"),
        ((torch.ones(3), "2"), TypeError, "stages must be a number or sizes, got str"),
        ((torch.ones(3, 1), 1), ValueError, r"difficulty must be \(P,\)"),
        (([1.0], 1), TypeError, "difficulty must be a torch.Tensor"),
    ],
)
def test_bad_use(arguments, error, message):
    with pytest.raises(error, match=message):
        StageSampler(*arguments)
