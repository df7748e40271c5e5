# SPDX-License-Identifier: Apache-2.0
"""Pairwise objectives with information from outside: identities, limits and domains."""

import math

import numpy as np
import pytest
import torch

from fastpref import objectives

P = 64
GENERATOR = torch.Generator().manual_seed(2)
LOGPS = -60 * torch.rand(4, P, dtype=torch.float64, generator=GENERATOR)
MARGINS = torch.randn(P, dtype=torch.float64, generator=GENERATOR) * 4
PROBS = torch.rand(P, dtype=torch.float64, generator=GENERATOR)
GAP = (LOGPS[0] - LOGPS[2]) - (LOGPS[1] - LOGPS[3])
ONES = torch.ones(P, dtype=torch.float64)


def evaluate(function, logps=LOGPS, **keywords):
    """Losses, rewards and the gradients of the summed losses."""
    leaves = [row.clone().requires_grad_() for row in logps]
    result = function(*leaves, **keywords)
    return [t.detach() for t in (*result, *torch.autograd.grad(result.losses.sum(), leaves))]


def close(actual, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-12}
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def fp32(*rows):
    """Log-probabilities of one pair each with these log-ratios, as an fp32 batch."""
    chosen, rejected = torch.tensor(rows).T
    return torch.stack([chosen, rejected, *torch.zeros(2, len(rows))])


DPO = {
    "soft_label_dpo": {"preference_probs": ONES},
    "da_dpo": {"reward_margin": 0 * ONES},
    "madpo, no damping": {"reward_margin": MARGINS, "c_min": 1.0},
    "madpo, no amplification": {"reward_margin": MARGINS, "c_max": 1.0},
    "madpo, neither": {"reward_margin": MARGINS, "c_min": 1.0, "c_max": 1.0},
    "madpo, below -tau": {"reward_margin": -MARGINS.abs() - 2},
    "odpo, alpha 0": {"reward_margin": PROBS, "alpha": 0.0},
    "odpo, margin 1": {"reward_margin": ONES, "alpha": 3.0},
    "rpo_reward": {"reward_margin": 1e4 * ONES},
    "mallows_po": {"ref_entropy": 0.25 * ONES, "phi": 1 / math.log(4)},
    "mcts_dpo": {"chosen_q_values": 9 * PROBS, "rejected_q_values": 0 * ONES},
}


@pytest.mark.parametrize("case", DPO)
def test_becomes_dpo(case):
    function = getattr(objectives, case.partition(",")[0])
    close(evaluate(function, beta=0.3, **DPO[case]), evaluate(objectives.dpo, beta=0.3))


def test_soft_labels_are_label_smoothing_for_each_pair():
    smoothed = evaluate(objectives.dpo, beta=0.3, label_smoothing=0.2)
    close(evaluate(objectives.soft_label_dpo, preference_probs=0.8 * ONES, beta=0.3), smoothed)
    flipped = evaluate(objectives.dpo, logps=LOGPS[[1, 0, 3, 2]], beta=0.3)[0]
    losses = evaluate(objectives.soft_label_dpo, preference_probs=0 * ONES, beta=0.3)[0]
    torch.testing.assert_close(losses, flipped)


def test_soft_labels_keep_the_digits_of_a_small_loss():
    logps = fp32([-300.0, 0.0], [-9000.0, 0.0])
    losses, *_, d_chosen, _, _, _ = evaluate(
        objectives.soft_label_dpo, logps, preference_probs=torch.zeros(2), beta=0.1
    )
    expected = torch.tensor([math.log1p(math.exp(-30)), 0.0])
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(d_chosen, 0.1 * torch.tensor([math.exp(-30), 0]), rtol=1e-5, atol=0)


def test_soft_labels_are_the_reward_distance_up_to_a_constant():
    """The backward KL to sigmoid(d) is the cross-entropy less the entropy of the target."""
    probs = PROBS.clamp(0.01, 0.99)
    soft = evaluate(objectives.soft_label_dpo, preference_probs=probs, beta=0.3)
    distance = evaluate(objectives.rpo_reward, reward_margin=torch.logit(probs), beta=0.3)
    entropy = -torch.xlogy(probs, probs) - torch.xlogy(1 - probs, 1 - probs)
    close([soft[0] - entropy, *soft[1:]], distance, rtol=1e-9, atol=1e-12)


def test_sppo_of_sure_wins_is_half_of_sppo_hard():
    wins = {"chosen_win_probs": ONES, "rejected_win_probs": 0 * ONES}
    losses, *rewards, d1, d2, d3, d4 = evaluate(objectives.sppo_hard, beta=0.01)
    expected = [losses / 2, *rewards, d1 / 2, d2 / 2, d3 / 2, d4 / 2]
    close(evaluate(objectives.sppo, beta=0.01, **wins), expected)


def test_madpo_amplifies_hard_pairs_and_damps_easy_ones():
    plain = objectives.dpo(*LOGPS[:, :5]).losses
    margins = torch.tensor([0.0, 1.0, 2.0, 6.0, 40.0]).double()
    settings = {"c_min": 0.25, "c_max": 3.0, "slope": 2.0, "tau": 2.0}
    losses = objectives.madpo(*LOGPS[:, :5], reward_margin=margins, **settings).losses
    weights = losses / plain
    assert weights[1] > weights[0] == weights[2] == 1 > weights[3]  # c is 1 at tau
    c = 0.25 + 2.75 / (1 + 2 / 0.75 * math.exp(2 * (1 - 2)))
    expected = (1 + math.exp(-1)) / (1 + math.exp(-c))
    np.testing.assert_allclose(weights[1], expected, rtol=1e-12)
    np.testing.assert_allclose(weights[4], 1 / (1 + math.exp(-10)), rtol=1e-4)


@pytest.mark.parametrize("margin", [-1e4, -1.999, 0.0, 1e4])
@pytest.mark.parametrize(("c_min", "c_max"), [(1.0, 1.0), (1e-3, 20.0), (1.0, 20.0), (0.5, 1.0)])
@pytest.mark.parametrize(("slope", "tau"), [(20.0, 20.0), (1e-3, 2.0), (20.0, 1e-3)])
def test_madpo_weights_stay_finite(margin, c_min, c_max, slope, tau):
    settings = {"c_min": c_min, "c_max": c_max, "slope": slope, "tau": tau}
    logps = fp32([0.0, -1e4], [-1e4, 0.0], [1.0, 2.0])
    margins = torch.full((3,), margin)
    results = evaluate(objectives.madpo, logps, reward_margin=margins, beta=1.0, **settings)
    assert all(torch.isfinite(value).all() for value in results)
    assert (results[0] <= 2 * objectives.dpo(*logps, beta=1.0).losses).all()


def test_da_dpo_multiplies_beta():
    easy = evaluate(objectives.da_dpo, reward_margin=-3 * ONES, beta=0.1, alpha=0.5)
    dpo = evaluate(objectives.dpo, beta=0.2)
    close(easy[:1] + easy[3:], dpo[:1] + dpo[3:])
    close(easy[1:3], [0.1 * (LOGPS[0] - LOGPS[2]), 0.1 * (LOGPS[1] - LOGPS[3])])


def test_odpo_shifts_the_margin():
    shifted = LOGPS.clone()
    shifted[0] -= 2 * torch.log(PROBS) / 0.3
    losses = evaluate(objectives.odpo, reward_margin=PROBS, beta=0.3, alpha=2.0)[0]
    torch.testing.assert_close(losses, evaluate(objectives.dpo, shifted, beta=0.3)[0])


@pytest.mark.parametrize("distance", ["backward_kl", "forward_kl", "square"])
def test_reward_distances_vanish_where_the_margins_agree(distance):
    keywords = {"beta": 0.3, "eta": 0.5, "distance": distance}
    losses, *_, slope, _, _, _ = evaluate(
        objectives.rpo_reward, reward_margin=0.6 * GAP, **keywords
    )
    torch.testing.assert_close(losses, 0 * ONES, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, 0 * ONES, rtol=0, atol=1e-12)
    away = objectives.rpo_reward(*LOGPS, reward_margin=0.6 * GAP + MARGINS, **keywords).losses
    assert (away > 0).all()


@pytest.mark.parametrize("distance", ["backward_kl", "forward_kl"])
def test_reward_distance_between_sure_opposites(distance):
    logps = fp32([0.0, -1e4], [-1e4, 0.0])
    margins = torch.tensor([-1e4, 1e4])
    results = evaluate(objectives.rpo_reward, logps, reward_margin=margins, distance=distance)
    reached = 1e3 if distance == "backward_kl" else 1e4
    torch.testing.assert_close(results[0], torch.full((2,), reached))
    assert all(torch.isfinite(value).all() for value in results)


def test_mallows_ipo_is_ipo_on_the_weighted_gap():
    entropy = 0.25 * ONES
    losses = objectives.mallows_po(*LOGPS, ref_entropy=entropy, phi=1 / math.log(4), loss="ipo")
    expected = objectives.ipo(*LOGPS, normalize="sum")
    close(losses, expected)
    halved = objectives.mallows_po(*LOGPS, ref_entropy=entropy.sqrt(), phi=1 / math.log(4))
    close(halved[:1], objectives.dpo(*LOGPS, beta=0.05)[:1])


def test_mcts_dpo_smooths_by_the_share_of_visits():
    visits = {"chosen_q_values": torch.full((P,), 6), "rejected_q_values": torch.full((P,), 2)}
    close(
        evaluate(objectives.mcts_dpo, beta=0.3, **visits),
        evaluate(objectives.dpo, beta=0.3, label_smoothing=0.25),
    )
    few = {"chosen_q_values": 0.1 * ONES, "rejected_q_values": 0.25 * ONES}  # less than one visit
    close(evaluate(objectives.mcts_dpo, **few), evaluate(objectives.dpo, label_smoothing=0.2))


def test_mcts_dpo_learns_no_preference_from_equal_visits():
    visits = {"chosen_q_values": 5 * ONES, "rejected_q_values": (5 + 40 * PROBS).floor()}
    losses = evaluate(objectives.mcts_dpo, beta=0.3, **visits)[0]
    flipped = evaluate(objectives.mcts_dpo, LOGPS[[1, 0, 3, 2]], beta=0.3, **visits)[0]
    torch.testing.assert_close(losses, flipped)


def test_mcts_ipo_does_not_use_the_visits():
    visits = {"chosen_q_values": 9 * PROBS, "rejected_q_values": 5 * ONES}
    close(
        evaluate(objectives.mcts_dpo, loss="ipo", **visits),
        evaluate(objectives.ipo, normalize="sum"),
    )


OUTSIDE = {
    "probability above 1": ("soft_label_dpo", {"preference_probs": 1.1 * ONES}, r"in \[0, 1\]"),
    "win probability below 0": (
        "sppo",
        {"chosen_win_probs": -ONES, "rejected_win_probs": ONES},
        r"chosen_win_probs must be in \[0, 1\], got -1",
    ),
    "margin of 0": ("odpo", {"reward_margin": 0 * ONES}, "reward_margin must be > 0, got 0"),
    "no entropy": ("mallows_po", {"ref_entropy": 0 * ONES}, r"ref_entropy must be in \(0, 1\)"),
    "entropy in nats": ("mallows_po", {"ref_entropy": 3 * ONES}, r"ref_entropy must be in \(0, 1"),
    "negative visits": (
        "mcts_dpo",
        {"chosen_q_values": ONES, "rejected_q_values": -ONES},
        "rejected_q_values must be >= 0",
    ),
    "damping that amplifies": (
        "madpo",
        {"reward_margin": ONES, "c_min": 1.5},
        r"c_min must be in \(0, 1\] \(easy pairs",
    ),
    "amplification that damps": (
        "madpo",
        {"reward_margin": ONES, "c_max": 0.5},
        r"c_max must be >= 1 \(hard pairs",
    ),
    "unknown distance": (
        "rpo_reward",
        {"reward_margin": ONES, "distance": "kl"},
        "must be one of 'backward_kl', 'forward_kl', 'square'",
    ),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_values_outside_their_domain(case):
    name, keywords, message = OUTSIDE[case]
    with pytest.raises(ValueError, match=message):
        getattr(objectives, name)(*LOGPS, **keywords)
