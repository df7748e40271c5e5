# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out in ``preference_loss``, at every tensor in turn: the call runs again with
less, and is as right as before."""

from types import SimpleNamespace

import pytest
import torch

from fastpref import ScoringOptions, explain, objectives, preference_loss
from fastpref.scoring import retry, schedule
from fastpref.scoring.batches import BatchedPlan
from tests.preference.plain_pairs import H, T, V, batch, found, plain
from tests.scoring import refusing
from tests.scoring.cases import check_contract

ROW = V * 4
SCHEDULES = {
    "batches": {"schedule": "batches", "memory_budget": 4 * T * ROW},
    "batches in part": {"schedule": "batches", "memory_budget": T * ROW},
    "two passes": {"schedule": "keep"},
}
LEAST = 8192  # bytes
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Every plan that did not fit, and what ran instead."""
    plans = []
    monkeypatch.setattr(retry, "_say", lambda planned, taken: plans.append((planned, taken)))
    return plans


def dpo(name, dtype, objective="dpo"):
    given = batch(dtype)
    options = ScoringOptions(**SCHEDULES[name])

    def inputs(dtype):
        own = {k: one.clone().to(dtype) if k != "target" else one for k, one in given.items()}
        own["hidden"].requires_grad_()
        own["weight"].requires_grad_()
        return own

    def make():
        own = inputs(dtype)

        def forward():
            return preference_loss(**own, objective=objective, options=options)

        return refusing.Call(forward, lambda out: found(out.loss, out.logps, own, 1.7))

    def check(results):
        truth = (inputs(one) for one in (dtype, torch.float64))
        eager, exact = (found(*plain(one, "dpo"), one, 1.7) for one in truth)
        check_contract(results, eager, exact)

    plan = explain(**inputs(dtype), objective=objective, options=options)
    assert plan.schedule == ("batches" if "batches" in name else "keep")
    return SimpleNamespace(make=make, check=check, plan=plan.policy)


def sweep(call, said, most):
    undisturbed = refusing.run(call.make(), refusing.never, LEAST)[1]
    for _, results in refusing.each_refused(call.make, LEAST, most):
        ((planned, taken),) = said
        said.clear()
        if str(planned) == str(taken):
            assert all(torch.equal(results[one], undisturbed[one]) for one in results)
        call.check(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_any_tensor_may_be_refused(name, dtype, said):
    sweep(dpo(name, dtype), said, 6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_tensor_refused_in_turn(name, dtype, said):
    sweep(dpo(name, dtype), said, None)


@pytest.mark.parametrize("name", ["batches", "two passes"])
def test_an_allocator_with_little_ends_in_the_least_tile(name, said):
    call = dpo(name, torch.float32)
    limit = max(V * H * 4, schedule.LEAST_ROWS * V * 4)
    mode, results = refusing.run(call.make(), refusing.above(limit), LEAST)
    assert mode.refused and not mode.leaked
    assert isinstance(said[-1][1], BatchedPlan) == ("batches" in name)
    call.check(results)


def random_loss(draws, fails):
    """Pairwise, with weights drawn anew at each call; memory runs out in call ``fails``."""

    def loss(policy_chosen, policy_rejected):
        draws.append(torch.rand(policy_chosen.shape))
        if len(draws) == fails:
            raise torch.OutOfMemoryError("no room in the objective")
        return draws[-1] * torch.nn.functional.softplus(policy_rejected - policy_chosen)

    return objectives.Objective(loss, unit="pair", scope="pair")


def test_random_numbers_are_those_of_an_undisturbed_call(said):
    """An objective is called to see whether it trains anything, once a batch, and for the losses;
    after the failure in its third batch again from the first."""
    own = batch(torch.float32)
    leaves = [own["hidden"].requires_grad_(), own["weight"].requires_grad_()]
    options = ScoringOptions(**SCHEDULES["batches"])
    results, draws = [], ([], [])
    for drawn, fails in zip(draws, (None, 4), strict=True):
        torch.manual_seed(3)
        objective = random_loss(drawn, fails)
        output = preference_loss(*leaves, own["target"], objective, options=options)
        gradients = torch.autograd.grad(output.loss, leaves)
        results.append((output.loss.detach(), *gradients, torch.rand(3)))
    undisturbed, disturbed = draws
    assert len(undisturbed) == 1 + 3 + 1 and len(said) == 1
    torch.testing.assert_close(disturbed[:1] + disturbed[4:], undisturbed)
    torch.testing.assert_close(results[1], results[0])


def test_totals_of_a_failed_attempt_leave_nothing(said):
    """Memory runs out in the last batch, when the gradient has the share of all before it."""
    call = dpo("batches", torch.float32)
    total = refusing.run(call.make(), refusing.never, LEAST)[0].count
    undisturbed = refusing.run(call.make(), refusing.never, LEAST)[1]
    mode, results = refusing.run(call.make(), refusing.at(total - 6), LEAST)
    assert mode.refused and said[-1][0] is not said[-1][1]
    for name, one in results.items():
        torch.testing.assert_close(one, undisturbed[name])


def test_a_gradient_of_the_log_probs_too(said):
    """Scored again in backward, where any tensor may be refused too."""
    own = batch(torch.float32)
    leaves = [own["hidden"].requires_grad_(), own["weight"].requires_grad_()]
    options = ScoringOptions(**SCHEDULES["batches"])

    def make():
        def forward():
            return preference_loss(**own, objective="dpo", options=options)

        def backward(output):
            both = output.loss + 0.1 * output.logps.sum()
            return dict(zip("ab", torch.autograd.grad(both, leaves), strict=True))

        return refusing.Call(forward, backward)

    mode, undisturbed = refusing.run(make(), refusing.never, LEAST)
    for number in range(0, mode.count, 2):
        # That of the loss is there already, and stays.
        results = refusing.run(make(), refusing.at(number), LEAST)[1]
        assert len(said) == 1
        said.clear()
        torch.testing.assert_close(results, undisturbed, rtol=1e-4, atol=1e-5)
