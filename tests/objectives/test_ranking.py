# SPDX-License-Identifier: Apache-2.0
"""Identities and edge cases of the objectives on the pairs of a ranked list."""

import math

import pytest
import torch

from fastpref import objectives

GENERATOR = torch.Generator().manual_seed(0)
POLICY, REF = -40 * torch.rand(2, 6, 5, generator=GENERATOR, dtype=torch.float64)
SCORES = torch.rand(6, 5, generator=GENERATOR, dtype=torch.float64)
LENGTHS = torch.randint(1, 20, (6, 5), generator=GENERATOR)
LAMBDA = ["lipo", "rank_dpo", "tpo"]


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def slope(objective, policy, *args, **extras):
    policy = policy.clone().requires_grad_()
    return torch.autograd.grad(objective(policy, *args, **extras).losses.sum(), policy)[0]


@pytest.mark.parametrize("name", LAMBDA)
def test_a_list_of_two_is_dpo_at_a_weight(name):
    scores = torch.tensor([[1.0, 0.0]] * 6)
    weight = 1 / math.log(2) - 1 / math.log(3)
    losses = objectives.get(name, beta=0.3)(POLICY[:, :2], REF[:, :2], scores=scores).losses
    expected = objectives.dpo(*POLICY[:, :2].T, *REF[:, :2].T, beta=0.3).losses
    close(losses, weight * expected)


@pytest.mark.parametrize("name", LAMBDA)
def test_weights_are_changes_in_dcg(name):
    """Pair by pair, from the definition."""
    objective = objectives.get(name, beta=0.3)
    losses, rewards = objective(POLICY, REF, scores=SCORES)
    ranking = SCORES if name == "rank_dpo" else rewards
    expected = torch.zeros(6, dtype=torch.float64)
    for group, i, j in torch.cartesian_prod(*map(torch.arange, (6, 5, 5))):
        if SCORES[group, i] > SCORES[group, j]:
            place_i, place_j = (1 + (ranking[group] > ranking[group, k]).sum() for k in (i, j))
            discounts = 1 / (1 + place_i).log() - 1 / (1 + place_j).log()
            gain = 2 ** SCORES[group, i] - 2 ** SCORES[group, j]
            margin = rewards[group, i] - rewards[group, j]
            expected[group] += gain * discounts.abs() * (1 + (-margin).exp()).log()
    close(losses, expected, 1e-6)


def test_lipo_and_rank_dpo_agree_where_the_policy_ranks_as_the_scores_do():
    agreeing = REF + 7 * SCORES
    arguments = {"scores": SCORES, "beta": 0.5}
    expected = objectives.rank_dpo(agreeing, REF, **arguments)
    close(objectives.lipo(agreeing, REF, **arguments), expected)
    opposed = REF - 7 * SCORES
    lipo = objectives.lipo(opposed, REF, **arguments).losses
    assert not torch.isclose(lipo, objectives.rank_dpo(opposed, REF, **arguments).losses).any()


def test_tree_preference_optimization_is_weighed_as_lipo():
    expected = objectives.lipo(POLICY, REF, scores=SCORES, beta=0.5)
    close(objectives.tpo(POLICY, REF, scores=SCORES), expected)


@pytest.mark.parametrize("name", LAMBDA)
def test_equal_scores_make_no_pair(name):
    extras = {"scores": torch.ones(6, 5)}
    assert (objectives.get(name)(POLICY, REF, **extras).losses == 0).all()
    assert (slope(objectives.get(name), POLICY, REF, **extras) == 0).all()


def test_approx_ndcg_becomes_ndcg():
    gains, places = 2**SCORES - 1, torch.arange(2.0, 7.0).double().log2()
    order = (POLICY - REF).argsort(-1, descending=True)
    ideal = (gains.sort(-1, descending=True).values / places).sum(-1)
    ndcg = (gains.gather(-1, order) / places).sum(-1) / ideal
    losses = objectives.lipo(POLICY, REF, scores=SCORES, variant="approx_ndcg", alpha=1e4).losses
    close(losses, -ndcg)
    best = objectives.lipo(REF + SCORES, REF, scores=SCORES, variant="approx_ndcg", alpha=1e6)
    close(best.losses, -torch.ones(6).double())


def test_approx_ndcg_of_a_list_without_gain():
    extras = {"scores": torch.zeros(6, 5)}
    lipo = objectives.get("lipo", variant="approx_ndcg")
    assert (lipo(POLICY, REF, **extras).losses == 0).all()
    assert (slope(lipo, POLICY, REF, **extras) == 0).all()


def test_pro_is_plackett_luce_on_means():
    means = POLICY / LENGTHS
    expected = objectives.plackett_luce(means, torch.zeros_like(REF), scores=SCORES, beta=1 / 0.4)
    pro = objectives.get("pro", tau=0.4, sft_weight=0)
    close(pro(POLICY, scores=SCORES, lengths=LENGTHS), expected)


def test_rrhf_is_a_hinge_on_every_pair():
    means = POLICY / LENGTHS
    order = SCORES.argsort(-1, descending=True)
    ranked = means.gather(-1, order)
    expected = sum(
        torch.relu(ranked[:, worse] - ranked[:, better])
        for better in range(5)
        for worse in range(better + 1, 5)
    )
    losses, rewards = objectives.rrhf(POLICY, scores=SCORES, lengths=LENGTHS, sft_weight=0)
    close(losses, expected)
    close(rewards, means)


def test_rrhf_at_the_kink_and_above_it():
    logps, ranks = torch.tensor([[-4.0, -4, -8], [-1, -2, -3]]), torch.tensor([[1, 2, 3]] * 2)
    extras = {"ranks": ranks, "lengths": torch.ones(2, 3), "sft_weight": 0}
    assert (objectives.rrhf(logps, **extras).losses == 0).all()
    assert (slope(objectives.rrhf, logps, **extras) == 0).all()


@pytest.mark.parametrize("name", ["pro", "rrhf"])
def test_sft_is_on_the_best_response(name):
    extras = {"scores": SCORES, "lengths": LENGTHS}
    objective = objectives.get(name, sft_weight=0.3)
    without = objective.replace(sft_weight=0)
    best = torch.nn.functional.one_hot(SCORES.argmax(-1), 5)
    nll = (-POLICY / LENGTHS * best).sum(-1)
    close(objective(POLICY, **extras).losses - without(POLICY, **extras).losses, 0.3 * nll)
    change = slope(objective, POLICY, **extras) - slope(without, POLICY, **extras)
    close(change, -0.3 * best.double() / LENGTHS)


@pytest.mark.parametrize("name", ["pro", "rrhf"])
def test_an_empty_response_counts_as_zero(name):
    lengths = LENGTHS.clone()
    lengths[:, 2] = 0
    objective, extras = objectives.get(name), {"scores": SCORES, "lengths": lengths}
    policy = POLICY.clone()
    policy[:, 2] = 0
    expected = objective(policy, scores=SCORES, lengths=LENGTHS)
    close(objective(POLICY, **extras), expected)
    assert (slope(objective, POLICY, **extras)[:, 2] == 0).all()
