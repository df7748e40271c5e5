# SPDX-License-Identifier: Apache-2.0
"""Statistics over ranks that hold different numbers of responses, or none: every objective that
takes a process group, and the helpers, against one process with the whole batch."""

import math

import pytest
import torch
import torch.distributed as dist

from fastpref import objectives
from fastpref.objectives import batch, registry
from fastpref.objectives.signature import POLICY_LOGPS

pytestmark = pytest.mark.heavy

T, WIDTH = 5, 3
SPLITS = [(4, 4), (3, 5), (2, 4), (0, 4), (8, 0), (1, 0), (0, 0)]
STATE = {"running_mean": torch.tensor(0.5, dtype=torch.float64)}
# Hyperparameters and 0-dim extras; the other extras are drawn.
CASES = {
    "aot": {"beta": 0.1, "label_smoothing": 0.1},
    "aot_unpaired": {"beta": 0.1},
    "dr_dpo": {"tau": 0.5},
    "beta_dpo": STATE,
    "beta_dpo, some kept": STATE,
    "relative_po": {},
    "amapo": {},
    "kto": {},
    "bco": {},
    "dapo": {"beta": 0.1},
    "cispo": {"beta": 0.1},
    "vespo": {"beta": 0.1},
    "disco": {"tau": 0.5, "delta": 0.01},
    "disco, on ratios": {"tau": math.inf, "score": "likelihood_ratio", "kl_estimator": "kl"},
}


def test_every_objective_with_a_group_is_here():
    with_group = [one.name for one in registry.catalogue() if "dp_group" in one.hyperparameters]
    assert set(with_group) == {case.partition(",")[0] for case in CASES}


def drawn(case, rows):
    """Log-probs and extras of ``rows`` responses or pairs."""
    generator = torch.Generator().manual_seed(rows)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    objective = objectives.get(case.partition(",")[0])
    by_token = objective.unit == "token"
    policy = POLICY_LOGPS[objective.unit]
    count = policy * (2 if by_token or objective.needs_reference else 1)
    logps = -20 * uniform(count, rows, *([T] if by_token else []))
    if by_token:
        logps[1] = logps[0] + uniform(rows, T) - 0.5
    everything = {
        "mask": uniform(rows, T) < 0.7,
        "advantages": uniform(rows) - 0.5,
        "ref_token_logp": logps[0] + uniform(*logps[0].shape) - 0.5,
        "labels": uniform(rows) < 0.5,
        "prompt_embeddings": uniform(rows, WIDTH) - 0.5,
        "chosen_lengths": (1 + 9 * uniform(rows)).long(),
        "rejected_lengths": (1 + 9 * uniform(rows)).long(),
        "rewards": (uniform(rows) < 0.5).double(),
        "group_ids": (3 * uniform(rows)).long(),
    }
    if case.endswith("some kept"):
        everything["keep"] = uniform(rows) < 0.6
    extras = {name: value for name, value in everything.items() if name in objective.extras}
    return logps, extras


def evaluated(case, logps, extras, group=None):
    """The losses, the rewards or ratios, and the gradients of the summed losses, rows first."""
    leaves = [one.clone().requires_grad_() for one in logps]
    function = getattr(objectives, case.partition(",")[0])
    settings = CASES[case] | extras | {"dp_group": group}
    result = function(*leaves, **settings)
    slopes = torch.autograd.grad(result.losses.sum(), leaves, materialize_grads=True)
    return [one.detach() for one in (*result, *slopes) if one is not None]


def part(value, split, rank):
    return value.split(split)[rank]


def on_a_rank(rank, split):
    """What ``evaluated`` gives for this rank's rows, and how many collectives it took."""
    found, calls = {}, []
    plain = batch._sum_over_ranks

    def counted(*args):
        calls.append(args)
        return plain(*args)

    batch._sum_over_ranks = counted
    try:
        for case in CASES:
            logps, extras = drawn(case, sum(split))
            logps = [part(one, split, rank) for one in logps]
            extras = {name: part(one, split, rank) for name, one in extras.items()}
            calls.clear()
            found[case] = evaluated(case, logps, extras, dist.group.WORLD), len(calls)
    finally:
        batch._sum_over_ranks = plain
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_losses_and_gradients_are_those_of_one_process(two_ranks, split):
    ranks = two_ranks(on_a_rank, split)
    for case in CASES:
        expected = evaluated(case, *drawn(case, sum(split)))
        parts = zip(*(rank[case][0] for rank in ranks), strict=True)
        for want, got in zip(expected, parts, strict=True):
            assert torch.isfinite(want).all() and [len(one) for one in got] == list(split)
            torch.testing.assert_close(torch.cat(got), want, rtol=1e-11, atol=1e-11)


def collectives(rank, split):
    return {case: calls for case, (_, calls) in on_a_rank(rank, split).items()}


def test_collectives_do_not_depend_on_the_data(two_ranks):
    counts = [one for split in SPLITS for one in two_ranks(collectives, split)]
    assert all(one == counts[0] for one in counts)
    assert all(counts[0].values())


VALUES = 30 * torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) + 4


def updated(batches, group=None):
    moments = objectives.RunningMoments()
    for one in batches:
        moments.update(one, group)
    return moments.mean.item(), moments.std.item(), moments.updates


def moments_on_a_rank(rank):
    return updated([part(VALUES[0, : sum(one)], one, rank) for one in SPLITS], dist.group.WORLD)


def test_moments_come_to_the_bits_of_one_process(two_ranks):
    for found in two_ranks(moments_on_a_rank):
        assert found == updated([VALUES[0, : sum(one)] for one in SPLITS])


REWARDS = VALUES[0].double()
PROMPTS = torch.tensor([7, -2, 7, 7, -2, 0, -2, 0])


def helpers_on_a_rank(rank, split):
    rows, group = slice(*((0, split[0]), (split[0], sum(split)))[rank]), dist.group.WORLD
    advantages = [
        objectives.group_advantages(
            REWARDS[rows], PROMPTS[rows], normalize=normalize, dp_group=group
        )
        for normalize in ("std", "none")
    ]
    margins = VALUES[1:4, rows]
    beta = objectives.epsilon_dpo_beta(0.1, *margins, 0.3, dp_group=group)
    # Equal values have exactly no spread, wherever they lie.
    mean, std = batch.mean_and_std(torch.full((split[rank],), 0.1), group)
    return advantages, beta, mean, std


@pytest.mark.parametrize("split", [(3, 5), (0, 4), (8, 0)])
def test_helpers_are_those_of_one_process(two_ranks, split):
    ranks, rows = two_ranks(helpers_on_a_rank, split), slice(sum(split))
    for place, normalize in enumerate(("std", "none")):
        whole = objectives.group_advantages(REWARDS[rows], PROMPTS[rows], normalize=normalize)
        torch.testing.assert_close(torch.cat([one[0][place] for one in ranks]), whole)
    beta = objectives.epsilon_dpo_beta(0.1, *VALUES[1:4, rows], 0.3)
    for _, found, mean, std in ranks:
        assert found == beta != 0.1
        assert (mean, std) == (torch.tensor(0.1), 0)
