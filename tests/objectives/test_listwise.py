# SPDX-License-Identifier: Apache-2.0
"""What every list objective must hold, and identities of those on whole lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import objectives

SCORED = ["adpo", "exo_listwise", "info_nca", "irpo", "lipo", "nca", "rank_dpo", "tpo"]
ORDERED = ["plackett_luce", "pro", "rrhf", "softmax_dpo"]
# An objective, its hyperparameters, and the extras it is given.
CASES = [
    *((name, {}, ("scores",)) for name in SCORED + ORDERED),
    *((name, {}, ("ranks",)) for name in ORDERED),
    ("adpo", {"target_kind": "one_hot"}, ("scores",)),
    ("adpo", {"target_kind": "plackett_luce"}, ("scores",)),
    ("adpo", {}, ("target_probs",)),
    ("irpo", {}, ("scores", "ranks")),
    ("irpo", {"normalize": False}, ("scores", "ranks")),
    ("lipo", {"variant": "approx_ndcg"}, ("scores",)),
]
cases = pytest.mark.parametrize(
    ("name", "hyperparameters", "given_extras"), CASES, ids=["-".join(map(str, c)) for c in CASES]
)
SEEDS = st.integers(0, 2**32)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def draw(name, given_extras, seed, size, groups=3):
    """Log-probabilities and extras of lists of ``size`` without ties."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        numbers = torch.rand(groups, size, generator=generator, dtype=torch.float64)
        return low + (high - low) * numbers

    objective = objectives.get(name)
    logps = [uniform(-40, 0) for _ in range(2 if objective.needs_reference else 1)]
    extras = {"scores": uniform(0, 3), "target_probs": uniform(0, 1), "lengths": uniform(1, 9)}
    extras["lengths"] = extras["lengths"].long()
    extras["ranks"] = 1 + uniform(0, 1).argsort(-1)
    wanted = {*given_extras, *(["lengths"] if "lengths" in objective.extras else [])}
    return logps, {key: extras[key] for key in sorted(wanted)}


def evaluate(name, hyperparameters, logps, extras):
    """Losses, rewards, and the gradient of losses in proportions 1 : 2 : ..., in no step NaN."""
    logps = [one.clone().requires_grad_() for one in logps]
    losses, rewards = objectives.get(name, **hyperparameters)(*logps, **extras)
    proportions = torch.arange(1, len(losses) + 1, dtype=losses.dtype)
    with torch.autograd.set_detect_anomaly(True):
        gradients = torch.autograd.grad(losses, logps, proportions)
    return losses.detach(), rewards, gradients


@cases
@given(seed=SEEDS, order=st.integers(2, 5).flatmap(lambda size: st.permutations(range(size))))
@settings(max_examples=20, deadline=None)
def test_the_order_of_input_does_not_matter(name, hyperparameters, given_extras, seed, order):
    if name == "irpo" and "ranks" not in given_extras:
        given_extras = ("scores", "ranks")
    logps, extras = draw(name, given_extras, seed, len(order))
    losses, rewards, gradients = evaluate(name, hyperparameters, logps, extras)
    moved = evaluate(
        name,
        hyperparameters,
        [one[:, order] for one in logps],
        {key: value[:, order] for key, value in extras.items()},
    )
    close(moved[0], losses)
    close(moved[1], rewards[:, order])
    for got, expected in zip(moved[2], gradients, strict=True):
        close(got, expected[:, order])


def insert(values, kept, size, junk):
    """``values`` at the places ``kept`` of a longer list, ``junk`` at the others."""
    longer = torch.full((len(values), size), junk).to(values.dtype)
    longer[:, kept] = values
    return longer


@cases
@given(
    seed=SEEDS,
    mask=st.lists(st.booleans(), min_size=1, max_size=5),
    junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]),
)
@settings(max_examples=40, deadline=None)
def test_absent_responses_reach_nothing(name, hyperparameters, given_extras, seed, mask, junk):
    kept = [place for place, present in enumerate(mask) if present]
    logps, extras = draw(name, given_extras, seed, len(kept))
    losses, rewards, gradients = evaluate(name, hyperparameters, logps, extras)
    longer = {
        key: insert(value, kept, len(mask), junk if value.is_floating_point() else 7)
        for key, value in extras.items()
    }
    longer["mask"] = torch.tensor([mask] * len(losses))
    actual = evaluate(
        name, hyperparameters, [insert(one, kept, len(mask), junk) for one in logps], longer
    )
    close(actual[0], losses)
    close(actual[1], insert(rewards, kept, len(mask), 0.0))
    for got, expected in zip(actual[2], gradients, strict=True):
        close(got, insert(expected, kept, len(mask), 0.0))


@cases
@pytest.mark.parametrize("present", [0, 1])
def test_a_list_that_compares_nothing(name, hyperparameters, given_extras, present):
    logps, extras = draw(name, given_extras, 0, 1)
    extras["mask"] = torch.full((3, 1), bool(present))
    losses, rewards, gradients = evaluate(name, hyperparameters, logps, extras)
    assert (losses == 0).all() and all((one == 0).all() for one in gradients)
    assert (rewards != 0).all() == bool(present)


@cases
@given(
    seed=SEEDS,
    logps=st.lists(st.sampled_from([0.0, -1e-3, -5.0, -1e4]), min_size=4, max_size=4),
    levels=st.sampled_from([1, 2, 1000]),
    scale=st.sampled_from([1e-3, 1.0, 20.0]),
)
@settings(max_examples=40, deadline=None)
def test_finite_in_fp32_with_ties_and_empty_responses(
    name, hyperparameters, given_extras, seed, logps, levels, scale
):
    _, extras = draw(name, given_extras, seed, 4)
    for key in extras.keys() - {"ranks"}:
        extras[key] = (extras[key].float() * levels).floor() / levels
    policy = torch.tensor([logps, logps[::-1], logps], requires_grad=True)
    scaled = {
        key: scale
        for key, fact in objectives.get(name).signature.hyperparameters.items()
        if fact.domain is not None
    }
    args = [policy, policy.detach().flip(0)][: 2 if objectives.get(name).needs_reference else 1]
    losses, rewards = objectives.get(name, **hyperparameters, **scaled)(*args, **extras)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.dtype == torch.float32
    assert all(one.isfinite().all() for one in (losses, rewards, gradient))


@pytest.mark.parametrize("name", ORDERED)
def test_scores_or_ranks_and_not_both(name):
    logps, extras = draw(name, ("scores", "ranks"), 0, 3)
    with pytest.raises(ValueError, match=r"scores .* or ranks .* got both"):
        objectives.get(name)(*logps, **extras)
    del extras["scores"], extras["ranks"]
    with pytest.raises(ValueError, match=r"scores .* or ranks .* got neither"):
        objectives.get(name)(*logps, **extras)


@pytest.mark.parametrize("name", ORDERED)
def test_scores_and_ranks_say_the_same(name):
    logps, extras = draw(name, ("scores",), 0, 5)
    expected = evaluate(name, {}, logps, extras)
    extras["ranks"] = 1 + extras.pop("scores").argsort(descending=True).argsort()
    close(evaluate(name, {}, logps, extras), expected)


@pytest.mark.parametrize("name", ORDERED)
def test_ties_keep_the_order_of_input(name):
    logps, extras = draw(name, ("scores",), 0, 4)
    extras["scores"] = torch.tensor([[1.0, 2, 1, 2]] * 3)
    expected = evaluate(name, {}, logps, extras)
    del extras["scores"]
    for ranks in ([3, 1, 4, 2], [2, 1, 2, 1]):
        extras["ranks"] = torch.tensor([ranks] * 3)
        close(evaluate(name, {}, logps, extras), expected)


def pair(beta=0.3):
    """Lists of two whose first is the better one, and what DPO makes of them."""
    policy, ref = -40 * torch.rand(2, 6, 2, dtype=torch.float64)
    losses = objectives.dpo(*policy.T, *ref.T, beta=beta).losses
    return policy, ref, torch.tensor([[1.0, 0.0]] * 6).double(), losses


def test_a_list_of_two_is_dpo():
    policy, ref, scores, expected = pair()
    for name in ("plackett_luce", "softmax_dpo"):
        close(objectives.get(name, beta=0.3)(policy, ref, scores=scores).losses, expected)
    adpo = objectives.get("adpo", tau=1 / 0.3, target_kind="one_hot")
    close(adpo(policy, ref, scores=scores).losses, expected)
    info_nca = objectives.get("info_nca", beta=0.3, alpha=1e-3)
    close(info_nca(policy, ref, scores=scores).losses, expected)
    irpo = objectives.get("irpo", beta=0.3)(policy, ref, scores=scores)
    close(irpo.losses, expected / 2)


def test_a_list_of_two_is_the_pairwise_objective_of_that_name():
    policy, ref, scores, _ = pair()
    nca = objectives.get("nca", beta=0.3, alpha=1e-3)(policy, ref, scores=scores)
    close(nca.losses, objectives.nca_pair(*policy.T, *ref.T, beta=0.3).losses)
    scores = scores * math.log(99)
    exo = objectives.get("exo_listwise", beta=0.3, tau=1.0)(policy, ref, scores=scores)
    expected = objectives.exo_pair(*policy.T, *ref.T, beta=0.3, label_smoothing=0.01)
    close(exo.losses, expected.losses)


def test_anchored_dpo_covers_others():
    (policy, ref), extras = draw("adpo", ("scores",), 0, 5)
    adpo = objectives.get("adpo", tau=4.0, target_tau=0.7)
    expected = objectives.info_nca(policy, ref, beta=0.25, alpha=0.7, **extras)
    close(adpo(policy, ref, **extras), expected)
    adpo = adpo.replace(target_kind="plackett_luce")
    close(adpo(policy, ref, **extras), objectives.plackett_luce(policy, ref, beta=0.25, **extras))
    adpo = adpo.replace(target_kind="one_hot")
    close(adpo(policy, ref, **extras), objectives.softmax_dpo(policy, ref, beta=0.25, **extras))


def test_target_probs_need_not_sum_to_one():
    (policy, ref), extras = draw("adpo", ("target_probs",), 0, 5)
    weights = extras["target_probs"]
    target = weights / weights.sum(-1, keepdim=True)
    losses, rewards, (gradient, _) = evaluate("adpo", {"tau": 2.0}, [policy, ref], extras)
    close(losses, evaluate("adpo", {"tau": 2.0}, [policy, ref], {"target_probs": target})[0])
    proportions = torch.tensor([[1.0], [2.0], [3.0]])
    close(gradient, proportions * (rewards.softmax(-1) - target) / 2)
    nothing = objectives.adpo(policy, ref, target_probs=torch.zeros_like(weights))
    assert (nothing.losses == 0).all()


def test_scores_or_target_probs_and_not_both():
    logps, extras = draw("adpo", ("scores", "target_probs"), 0, 3)
    with pytest.raises(ValueError, match="one of scores and target_probs, got both"):
        objectives.adpo(*logps, **extras)
    with pytest.raises(ValueError, match="one of scores and target_probs, got neither"):
        objectives.adpo(*logps)


def test_exo_is_zero_at_its_target():
    scores = torch.rand(3, 5, dtype=torch.float64)
    logps = [scores / 0.1 - 3, torch.zeros_like(scores)]
    hyperparameters = {"beta": 0.5, "tau": 0.2}
    losses, _, (gradient, _) = evaluate("exo_listwise", hyperparameters, logps, {"scores": scores})
    close((losses, gradient), (torch.zeros(3).double(), torch.zeros(3, 5).double()))


def test_irpo_takes_places_from_the_order_of_those_present():
    (policy, ref), extras = draw("irpo", ("scores",), 0, 4)
    mask = torch.tensor([[True, False, True, True]] * 3)
    expected = objectives.irpo(policy, ref, mask=mask, **extras).losses
    ranks = torch.tensor([[1, 9, 2, 3]] * 3)
    close(objectives.irpo(policy, ref, mask=mask, ranks=ranks, **extras).losses, expected)


def test_irpo_at_the_reference():
    logps = torch.full((1, 4), -3.0, dtype=torch.float64)
    scores = torch.tensor([[2.0, 0, 1, 0]]).double()
    weight = (3 / math.log2(2) + 1 / math.log2(4)) / 4
    for normalize, expected in [(True, math.log(2)), (False, math.log(4))]:
        losses = objectives.irpo(logps, logps, scores=scores, normalize=normalize).losses
        close(losses, torch.full_like(losses, weight * expected))


@pytest.mark.parametrize("name", ["plackett_luce", "softmax_dpo"])
def test_small_losses_keep_their_digits(name):
    policy = torch.tensor([[0.0, -30.0]], requires_grad=True)
    objective = objectives.get(name, beta=1.0)
    losses = objective(policy, torch.zeros(1, 2), ranks=torch.tensor([[1, 2]])).losses
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    close(losses / math.exp(-30), torch.ones(1), 1e-5)
    close(gradient / math.exp(-30), torch.tensor([[-1.0, 1.0]]), 1e-5)
