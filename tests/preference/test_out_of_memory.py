# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out in ``preference_loss``, at every tensor in turn: the call runs again with
less, and is as right as before."""

from types import SimpleNamespace

import pytest
import torch

from fastpref import ScoringOptions, explain, objectives, preference_loss
from fastpref.scoring import plan as schedule
from fastpref.scoring import retry
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


@pytest.mark.heavy
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
    planned, taken = said[-1]
    assert isinstance(planned, BatchedPlan) == ("batches" in name)
    assert taken.schedule != "batches" and taken.kept_rows <= schedule.LEAST_ROWS
    assert max(one.nbytes(4) for one in (taken.forward_tile, taken.backward_tile)) <= limit
    call.check(results)


def test_batches_give_up_their_totals(said):
    """In 16 bits the gradient of the weight and a least tile are all that two passes need; one pass
    adds up a gradient in float32, twice as large, whatever its batches keep."""
    rows, vocab = 80, 4 * schedule.LEAST_COLS
    half = {"dtype": torch.bfloat16, "device": "cpu"}
    hidden, weight = torch.randn(4, rows, H, **half), torch.randn(vocab, H, **half) / 4
    target = torch.randint(vocab, (4, rows), device="cpu")
    options = ScoringOptions(schedule="batches", memory_budget=rows * vocab * 2)

    def make():
        leaves = [one.clone().requires_grad_() for one in (hidden, weight)]

        def forward():
            return preference_loss(*leaves, target, "simpo", options=options)

        def backward(output):
            gradients = torch.autograd.grad(output.loss, leaves)
            return dict(zip(("loss", "a", "b"), (output.loss.detach(), *gradients), strict=True))

        return refusing.Call(forward, backward)

    undisturbed = refusing.run(make(), refusing.never, LEAST)[1]
    limit = vocab * H * 2
    assert schedule.LEAST_ROWS * schedule.LEAST_COLS * 2 < limit
    mode, results = refusing.run(make(), refusing.above(limit), LEAST)
    assert mode.refused and not mode.leaked and said
    for name, one in undisturbed.items():
        assert (results[name] - one).float().norm() < 5e-3 * one.float().norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_one_pass_names_it_and_forms_no_wide_product(dtype, said):
    """Gradients are there already, and are only scaled into the dtype of their inputs."""
    call = dpo("batches", dtype)
    found = call.make()
    output = found.forward()
    with refusing.Refusing(refusing.at(0), V * H * dtype.itemsize) as mode:
        results = found.backward(output)
    assert mode.refused == 1 and mode.count == 2
    ((planned, taken),) = said
    assert isinstance(planned, BatchedPlan) and planned is taken
    call.check(results)


def random_loss(draws, fails):
    """Pairwise, with a weight drawn anew at each call; memory runs out in call ``fails``."""

    def loss(policy_chosen, policy_rejected):
        draws.append(torch.rand((), device="cpu"))
        if len(draws) == fails:
            raise torch.OutOfMemoryError("no room in the objective")
        return draws[-1] * torch.nn.functional.softplus(policy_rejected - policy_chosen)

    return objectives.Objective(loss, unit="pair", scope="pair")


def test_random_numbers_begin_where_the_failed_attempt_did(said):
    """An objective is called to see whether it trains anything, and once a batch; after the failure
    in its third batch for the loss of two passes, from the numbers of the first. At last it is
    called for the losses."""
    own = batch(torch.float32)
    leaves = [own["hidden"].requires_grad_(), own["weight"].requires_grad_()]
    results, draws = [], ([], [])
    for drawn, fails in zip(draws, (None, 4), strict=True):
        torch.manual_seed(3)
        options = ScoringOptions(**SCHEDULES["batches" if fails else "two passes"])
        objective = random_loss(drawn, fails)
        output = preference_loss(*leaves, own["target"], objective, options=options)
        gradients = torch.autograd.grad(output.loss, leaves)
        results.append((output.loss.detach(), *gradients))
    (only,), disturbed = draws
    assert len(disturbed) == 1 + 3 + 2 and disturbed[4] == disturbed[1] and len(said) == 1
    undisturbed = tuple(one / only for one in results[0])
    torch.testing.assert_close(tuple(one / disturbed[4] for one in results[1]), undisturbed)


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
