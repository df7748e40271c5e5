# SPDX-License-Identifier: Apache-2.0
"""Pairs that one operator takes from the scores of their tokens to the loss: as step by step, and
what it does not serve."""

import contextlib
import math

import pytest
import torch

from fastpref import objectives, preference_loss
from fastpref._extension import ops_unavailable_reason
from fastpref.preference import pairs, result
from fastpref.units.pair_head import Link
from tests.units.test_pair_head import FAMILY, IDS

pytestmark = pytest.mark.skipif(
    ops_unavailable_reason() is not None, reason=f"no operators: {ops_unavailable_reason()}"
)
B, T, H, V = 6, 5, 4, 23
EXACT = {"rtol": 1e-12, "atol": 1e-13}
CLOSE = {torch.float64: EXACT, torch.float32: {"rtol": 3e-6, "atol": 3e-6}}
CLOSE[torch.bfloat16] = {"rtol": 2**-7, "atol": 1e-5}
REDUCTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "of several batches": {"denominator": 7},
}


@pytest.fixture
def settled(monkeypatch):
    """The calls that the operator took."""
    found = []

    def noted(pairs, *given):
        found.append(pairs)
        return own(pairs, *given)

    own = result.pair_output
    monkeypatch.setattr(result, "pair_output", noted)
    return found


def batch(dtype=torch.float64, seed=0):
    made = torch.Generator().manual_seed(seed)
    target = torch.randint(0, V, (B, T), generator=made)
    target[torch.rand(B, T, generator=made) < 0.3] = -100
    target[4] = -100  # an empty response
    hidden, weight = torch.randn(B, T, H, generator=made), torch.randn(V, H, generator=made)
    return hidden.to(dtype), weight.to(dtype), target


def references(objective, dtype):
    """By how they are given."""
    if not objective.needs_reference:
        return {"none": {}}
    made = torch.Generator().manual_seed(9)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = -torch.rand(B, T, generator=made).to(exact)
    hidden = torch.randn(B, T, H, generator=made).to(dtype)
    return {
        "sums": {"ref_logps": tokens.sum(1)},
        "tokens": {"ref_logps": tokens},
        "hidden": {"ref_hidden": hidden},
    }


def results(objective, dtype, of_loss, of_logps, **arguments):
    """All of the output, and gradients of the loss and the sums of log-probs."""
    hidden, weight, target = batch(dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    output = preference_loss(hidden, weight, target, objective, **arguments)
    upstream = torch.arange(1.0, B + 1).to(output.logps.dtype)
    total = of_loss * output.loss if of_loss else 0
    if of_logps:
        total = total + (output.logps * upstream).sum()
    gradients = torch.autograd.grad(total, (hidden, weight))
    with torch.no_grad():
        again = preference_loss(hidden, weight, target, objective, **arguments)
    return output, gradients, again


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("objective", FAMILY, ids=IDS)
def test_as_step_by_step(monkeypatch, settled, objective, dtype, layout, reduction):
    given = {"layout": layout, **REDUCTIONS[reduction]}
    upstreams = [(1, True), (0, True), (-0.7, False)]
    for (name, reference), upstream in zip(
        references(objective, dtype).items(), upstreams, strict=False
    ):
        settled.clear()
        found = results(objective, dtype, *upstream, **given, **reference)
        assert len(settled) == 2, name
        with monkeypatch.context() as step_by_step:
            step_by_step.setattr(result, "serves", lambda *tensors: False)
            expected = results(objective, dtype, *upstream, **given, **reference)
        assert len(settled) == 2
        for one, other in ((found[0], expected[0]), (found[2], expected[2])):
            assert type(one) is type(other)
            for field in ("loss", "losses", "rewards", "logps", "ref_logps"):
                got, want = getattr(one, field), getattr(other, field)
                assert (got is None) == (want is None), field
                if want is not None:
                    assert got.requires_grad == want.requires_grad, field
                    torch.testing.assert_close(got, want, **CLOSE[dtype])
            assert one.metrics.keys() == other.metrics.keys()
            for label, metric in one.metrics.items():
                torch.testing.assert_close(metric, other.metrics[label], **CLOSE[dtype])
                assert not metric.requires_grad
        for got, want in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(got, want, **CLOSE[dtype])


@pytest.mark.parametrize("objective", FAMILY, ids=IDS)
def test_the_equation(settled, objective):
    """In plain torch in float64, from whole logits."""
    hidden, weight, target = batch()
    hidden.requires_grad_(), weight.requires_grad_()
    reference = references(objective, torch.float64).get("sums", {})
    output = preference_loss(hidden, weight, target, objective, **reference)
    assert len(settled) == 1
    logp = (hidden @ weight.t()).log_softmax(-1)
    logp = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    scored = target != -100
    ratios = torch.where(scored, logp, 0).sum(1) - reference.get("ref_logps", 0)
    settings = objective.hyperparameters
    beta = settings["beta"]
    per_token = objective.name == "simpo" or settings.get("normalize") == "mean"
    if per_token:
        lengths = scored.sum(1)
        ratios = torch.where(lengths > 0, ratios / lengths.clamp(min=1), 0)
    gap = ratios[: B // 2] - ratios[B // 2 :]
    if objective.name == "ipo":
        losses = (gap - 1 / (2 * beta)) ** 2
    elif objective.name == "hinge":
        losses = torch.relu(1 - beta * gap)
    else:
        margin, flipped = beta * gap - settings.get("gamma", 0), settings["label_smoothing"]
        sigmoid = torch.nn.functional.logsigmoid
        losses = -(1 - flipped) * sigmoid(margin) - flipped * sigmoid(-margin)
    torch.testing.assert_close(output.losses, losses.detach(), **EXACT)
    torch.testing.assert_close(output.loss, losses.mean(), **EXACT)
    wanted = torch.autograd.grad(losses.mean(), (hidden, weight))
    for got, want in zip(torch.autograd.grad(output.loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


ELSEWHERE = {
    "weights of tokens": {
        "token_weights": torch.ones(B, T).double(),
        "ref_logps": torch.zeros(B, T).double(),
    },
    "packed": {"cu_seqlens": torch.arange(0, B * T + 1, T)},
    "pairs by index": {"layout": torch.tensor([[0, 3], [1, 4], [2, 5]])},
    "losses": {"reduction": "none"},
    "a denominator on the device": {"denominator": torch.tensor(3.0)},
    "a beta a pair": {"beta": torch.full((B // 2,), 0.1).double()},
    "single responses": {"objective": "kto", "layout": "units"},
    "another pairwise one": {"objective": "cpo", "ref_logps": None},
    "a function of one's own": {
        "objective": lambda chosen, rejected, ref_chosen, ref_rejected: rejected - chosen
    },
    "targets in int32": {"target": batch()[2].int()},
    "targets that lie otherwise": {"target": batch()[2].t().contiguous().t()},
    "a reference in float32": {"ref_logps": torch.zeros(B)},
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_goes_step_by_step(settled, case):
    hidden, weight, target = batch()
    given = {"target": target, "objective": "dpo", "ref_logps": torch.zeros(B).double()}
    given |= ELSEWHERE[case]
    if "cu_seqlens" in given:
        hidden, given["target"] = hidden.flatten(0, 1), given["target"].flatten()
    labels = {"extras": {"labels": torch.arange(B) % 2}} if given["objective"] == "kto" else {}
    output = preference_loss(hidden.requires_grad_(), weight, **given, **labels)
    output.loss.sum().backward()
    assert output.loss.isfinite().all() and not settled


def test_objectives_as_values_are_kept_too(settled):
    """By what is set in them; a function of one's own is not."""
    hidden, weight, target = batch()
    given = {"ref_logps": torch.zeros(B).double()}
    losses = [
        preference_loss(hidden, weight, target, one, **given).loss
        for one in (
            objectives.get("dpo"),
            objectives.get("dpo", beta=0.5),
            objectives.get("dpo", beta=0.5).replace(label_smoothing=0.2),
            objectives.get("hinge", beta=0.5),
        )
    ]
    again = preference_loss(hidden, weight, target, objectives.get("dpo"), beta=0.5, **given).loss
    assert len(settled) == 5 and again == losses[1]
    assert len({float(one) for one in losses}) == 4
    by_name = {"beta": 0.5, "label_smoothing": 0.2, **given}
    assert preference_loss(hidden, weight, target, "dpo", **by_name).loss == losses[2]
    beta = torch.full((B // 2,), 0.5).double()
    per_unit = objectives.get("dpo", beta=beta)
    found = preference_loss(hidden, weight, target, per_unit, **given).loss
    torch.testing.assert_close(found, losses[1])
    beta.fill_(0.1)  # which is read at every call
    found = preference_loss(hidden, weight, target, per_unit, **given).loss
    torch.testing.assert_close(found, losses[0])


@pytest.mark.parametrize("trained", [False, True])
def test_a_reference_that_is_trained_elsewhere_gets_no_gradient(settled, trained):
    hidden, weight, target = batch()
    reference, ref_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    hidden.requires_grad_(trained)
    given = {"ref_hidden": reference, "ref_weight": ref_weight}
    for level in (contextlib.nullcontext, torch.autograd.forward_ad.dual_level):
        with level():
            output = preference_loss(hidden, weight, target, "dpo", **given)
        assert not output.ref_logps.requires_grad and output.loss.requires_grad == trained
        if trained:
            output.loss.backward()
    assert reference.grad is None and ref_weight.grad is None and len(settled) == 2


def test_batches_of_gradients_and_second_derivatives(settled):
    hidden, weight, target = batch()
    given = {"ref_logps": torch.zeros(B).double()}
    hidden.requires_grad_()
    output = preference_loss(hidden, weight, target, "dpo", **given)
    own = torch.tensor([1.0, -2.0, 0.5]).double()
    batched = torch.autograd.grad(
        output.loss, hidden, own, is_grads_batched=True, retain_graph=True
    )[0]
    (once,) = torch.autograd.grad(output.loss, hidden, retain_graph=True)
    torch.testing.assert_close(batched, own.view(-1, 1, 1, 1) * once)
    (first,) = torch.autograd.grad(output.loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    assert len(settled) == 1


def test_another_index_may_be_ignored(settled):
    hidden, weight, target = batch()
    other = torch.where(target == -100, 0, target + 1)
    weight = torch.cat([torch.zeros(1, H).double(), weight])
    bias = torch.zeros(V + 1).double()
    bias[0] = -torch.inf
    given = {"ref_logps": torch.zeros(B).double()}
    expected = preference_loss(hidden, weight[1:], target, "ipo", **given)
    found = preference_loss(hidden, weight, other, "ipo", bias=bias, ignore_index=0, **given)
    torch.testing.assert_close(found.losses, expected.losses, **EXACT)
    assert len(settled) == 2


def test_a_target_that_is_none_spoils_its_pair_alone(settled):
    hidden, weight, target = batch()
    target[1, 2] = V + 3
    output = preference_loss(hidden, weight, target, "dpo", ref_logps=torch.zeros(B).double())
    assert output.losses.isnan().tolist() == [False, True, False]
    assert output.logps.isnan().sum() == 1 and len(settled) == 1


def call(logp, target, ref_logps=None, interleaved=False, **changes):
    link = Link(0, 0.1, 0.1)._replace(**changes)
    given = pairs.PairCall(
        pairs.Interleaved() if interleaved else pairs.Halves(), len(logp) / 2, link
    )
    return pairs._settled(logp, target, -100, ref_logps, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tokens_that_are_not_scored_are_not_read(dtype):
    logp, target = -torch.rand(B, T, dtype=dtype), torch.zeros(B, T, dtype=torch.int64)
    target[:, 2], target[3] = -100, -100
    expected = call(logp, target, gap_per_token=True)
    logp[:, 2], logp[3] = math.nan, math.inf
    for got, want in zip(call(logp, target, gap_per_token=True), expected, strict=True):
        assert torch.equal(got, want)
    assert expected[3][3] == 0 and expected[4][3] == 0  # nothing scored: sum and slope


def test_a_reference_that_lies_with_gaps():
    logp, target = -torch.rand(B, T), torch.zeros(B, T, dtype=torch.int64)
    reference = torch.randn(2 * B)[::2]
    assert not reference.is_contiguous()
    for interleaved in (False, True):
        found = call(logp, target, reference, interleaved)
        expected = call(logp, target, reference.contiguous(), interleaved)
        assert all(torch.equal(*one) for one in zip(found, expected, strict=True))
        assert not torch.equal(found[0], call(logp, target, None, interleaved)[0])


WRONG = {
    "logp must have shape": {"logp": torch.zeros(3, T)},
    "logp must be float64 or float32": {"logp": torch.zeros(B, T).half()},
    "target must have shape": {"target": torch.zeros(B, T + 1, dtype=torch.int64)},
    "target must be int64": {"target": torch.zeros(B, T, dtype=torch.int32)},
    "logp must be contiguous": {"logp": torch.zeros(T, B).t()},
    "target must be contiguous": {"target": torch.zeros(T, B, dtype=torch.int64).t()},
    "ref_logps must have shape": {"ref_logps": torch.zeros(B - 1)},
    "ref_logps must have the dtype": {"ref_logps": torch.zeros(B).double()},
    "link must be": {"link": 3},
    "divisor must be greater than 0": {"divisor": 0.0},
}


def arguments(**changes):
    given = {"logp": torch.zeros(B, T), "target": torch.zeros(B, T, dtype=torch.int64)}
    given |= {"ignore_index": -100, "ref_logps": None, "interleaved": False, "per_token": False}
    given |= {"divisor": 3.0, "link": 0, "scale": 0.1, "shift": 0.0, "flipped": 0.0}
    return given | {"reward_scale": 0.1, "rewards_per_token": False} | changes


@pytest.mark.parametrize("message", WRONG)
def test_arguments_of_the_operator(message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpref.pair_rows(**arguments(**WRONG[message]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(dtype, interleaved):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for reference in (None, torch.zeros(B, dtype=dtype)):
        given = arguments(logp=torch.zeros(B, T, dtype=dtype), ref_logps=reference)
        given["interleaved"] = interleaved
        torch.library.opcheck(torch.ops.fastpref.pair_rows.default, (), given, test_utils=checks)
