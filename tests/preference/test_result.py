# SPDX-License-Identifier: Apache-2.0
"""Extras that are made of whole distributions, against whole logits in plain torch."""

import pytest
import torch

from fastpref import ScoringOptions, objectives, preference_loss
from tests.preference.cases import Data, T, V, compare, halves, run, run_packed, token_logp
from tests.preference.two_models import MAPS, reference_losses

CONFIGURATIONS = [
    ("tdpo", {"version": 1}),
    ("tdpo", {"version": 2}),
    ("epsilon_dpo", {"epsilon": 0.3}),
]


@pytest.mark.parametrize("name, hyperparameters", CONFIGURATIONS)
@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("budget", [None, 1])
def test_of_two_distributions(name, hyperparameters, map, weighted, budget) -> None:
    objective, data = objectives.get(name, **hyperparameters), Data()
    losses = reference_losses(objective, data, MAPS[map], weighted)
    changes = dict(MAPS[map], options=ScoringOptions(memory_budget=budget))
    if weighted:
        changes["token_weights"] = data.token_weights
    compare(data, losses, run(objective, data, **changes))


@pytest.mark.parametrize("name, hyperparameters", CONFIGURATIONS)
def test_packed_rows(name, hyperparameters) -> None:
    objective, data = objectives.get(name, **hyperparameters), Data()
    losses = reference_losses(objective, data, {}, False)
    compare(data, losses, run_packed(objective, data))


def test_steps_of_epsilon_dpo_go_either_way() -> None:
    """Else the margins would not be looked at in the tests above."""
    objective, data = objectives.get("epsilon_dpo", epsilon=0.3), Data()
    plain = run(objectives.get("dpo", beta=0.01), data).losses
    assert (run(objective, data).losses != plain).any()


def test_given_extras_are_taken() -> None:
    objective, data = objectives.get("tdpo"), Data()
    extras = {"chosen_kl": torch.zeros(4).double(), "rejected_kl": torch.zeros(4).double()}
    got = run(objective, data, extras=extras)
    want = run(objectives.get("dpo"), data)
    torch.testing.assert_close(got.losses, want.losses)


@pytest.mark.parametrize("name", ["tdpo", "epsilon_dpo"])
def test_without_the_reference_itself(name: str) -> None:
    objective, data = objectives.get(name), Data()
    ref = token_logp(data.ref_hidden, data.ref_weight, data.ref_bias, data).detach()
    with pytest.raises(ValueError, match=f"{name} compares whole distributions: .* ref_hidden"):
        preference_loss(data.hidden, data.weight, data.target, objective, ref_logps=ref)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_divergences_in_batches(version: int, weighted: bool) -> None:
    """With their gradients: as in two passes."""
    objective, found = objectives.get("tdpo", version=version), []
    for schedule, share in (("batches", 3), ("keep", 100), ("recompute", 3)):
        data = Data()
        data.token_weights.requires_grad_(False)
        more = {"token_weights": data.token_weights} if weighted else {}
        budget = share * T * V * 8
        options = ScoringOptions(schedule=schedule, memory_budget=budget)
        output = run(objective, data, options=options, **more)
        (1.3 * output.loss + output.logps.sum()).backward()
        gradients = [one.grad for one in (data.hidden, data.weight, data.bias)]
        found.append([output.loss.detach(), output.losses, output.logps.detach(), *gradients])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-9, atol=1e-9)


def test_lengths_that_are_given_must_be_those_of_the_batch() -> None:
    data, objective = Data(), objectives.get("simpo")
    chosen, rejected = halves(data.scored.sum(1))
    filled = run(objective, data).losses
    # Row 5 has no scored token: any length will do there.
    given = {"chosen_lengths": chosen, "rejected_lengths": rejected.clamp(min=1)}
    found = run(objective, data, extras=given).losses
    torch.testing.assert_close(found, filled, rtol=1e-12, atol=0)
    given["rejected_lengths"] = rejected + torch.tensor([0, 0, 2, 0])
    right = int(rejected[2])
    message = rf"rejected_lengths must be .* got {right + 2} for response 2, which has {right};"
    with pytest.raises(ValueError, match=message):
        run(objective, data, extras=given)


def test_a_function_of_ones_own_gets_what_it_names() -> None:
    data = Data()

    def own(policy_chosen, policy_rejected, *, chosen_lengths, rejected_lengths):
        return policy_rejected / rejected_lengths.clamp(1) - policy_chosen / chosen_lengths

    arguments = (data.hidden, data.weight, data.target)
    got = preference_loss(*arguments, own, bias=data.bias).losses
    lengths = data.scored.sum(1).clamp(min=1)
    means = token_logp(data.hidden, data.weight, data.bias, data).sum(1) / lengths
    chosen, rejected = halves(means)
    torch.testing.assert_close(got, (rejected - chosen).detach())


NAMES = ["tdpo", "epsilon_dpo"]


@pytest.mark.parametrize("name", NAMES)
def test_no_scored_token(name: str) -> None:
    data = Data()
    data.token_weights.requires_grad_(False)
    data.target.fill_(-100)
    for options in (None, ScoringOptions(schedule="recompute"), ScoringOptions(memory_budget=1)):
        output = run(objectives.get(name), data, options=options)
        (gradient,) = torch.autograd.grad(output.loss, data.weight)
        assert output.loss.isfinite() and not gradient.any()


@pytest.mark.parametrize("schedule", ["auto", "keep", "recompute", "batches", "direct"])
def test_a_reference_that_is_broken_reaches_what_is_made_of_it_alone(schedule: str) -> None:
    """One pair's divergence is NaN; the other pairs' log-probs and gradients are not."""
    data = Data()
    for one in (data.token_weights, data.bias, data.weight):
        one.requires_grad_(one is data.weight and schedule != "direct")
    # Of a row whose token is scored.
    broken, at = data.ref_hidden.clone(), data.scored[0].nonzero()[0, 0]
    broken[0, at] = torch.nan
    data.ref_hidden = broken
    leaves = [one for one in (data.hidden, data.weight) if one.requires_grad]
    output = run(objectives.get("tdpo"), data, options=ScoringOptions(schedule=schedule))
    for gradient in torch.autograd.grad(output.logps.sum(), leaves, retain_graph=True):
        assert gradient.isfinite().all()
    healthy = torch.tensor([False, True, True, True] * 2)
    assert output.logps.isfinite().all() and output.rewards[healthy].isfinite().all()


def test_margins_ask_nothing_of_the_reference_in_backward() -> None:
    """It may be made in inference mode, and changed before the gradient is taken."""
    found = []
    for schedule in ("keep", "recompute"):
        for changed in (False, True):
            data = Data()
            data.token_weights.requires_grad_(False)
            with torch.inference_mode():
                data.ref_hidden = data.ref_hidden + 0
            options = ScoringOptions(schedule=schedule)
            output = run(objectives.get("epsilon_dpo"), data, options=options)
            if changed:
                data.ref_weight.mul_(0.9)
            found.append(torch.autograd.grad(output.loss, (data.hidden, data.weight)))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


@pytest.mark.parametrize("name", ["dpo", "tdpo"])
def test_a_target_that_lies_across(name: str) -> None:
    data, found = Data(), []
    data.token_weights.requires_grad_(False)
    for across in (False, True):
        if across:
            data.target = data.target.t().contiguous().t()
        options = ScoringOptions(schedule="batches", memory_budget=3 * T * V * 8)
        output = run(objectives.get(name), data, options=options)
        found.append(torch.autograd.grad(output.loss, (data.hidden, data.weight)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_margins_of_a_function_without_epsilon() -> None:
    def own(chosen, rejected, ref_chosen, ref_rejected, *, margin_plus):
        return rejected - chosen + ref_chosen - ref_rejected + margin_plus

    objective = objectives.Objective(own, unit="pair", scope="batch")
    with pytest.raises(ValueError, match=r"own takes margin_plus, which are made with .*'epsilon'"):
        run(objective, Data())
