# SPDX-License-Identifier: Apache-2.0
"""The short passes: bit for bit what the passes for any rule and tiles give, and those where they
do not serve."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastpref import ScoringOptions, explain, linear_logprob, preference_loss
from fastpref._extension import ops_unavailable_reason
from fastpref.scoring import autograd, batches, retry, straight
from tests.scoring import refusing

pytestmark = pytest.mark.skipif(
    ops_unavailable_reason() is not None, reason=f"no operators: {ops_unavailable_reason()}"
)
N, H, V = 90, 12, 517
LEAST = 2048  # bytes: matrices, and not vectors of N
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SCHEDULES = {
    "score": ((), "auto"),
    "direct": (("hidden",), "direct"),
    "keep": (("hidden", "weight"), "keep"),
    "keep, frozen": (("hidden",), "keep"),
    "keep, weight alone": (("weight",), "keep"),
}


@pytest.fixture
def calls(monkeypatch):
    """Which passes ran."""
    found = []

    def listed(name, function):
        def called(*args, **kwargs):
            found.append(name)
            return function(*args, **kwargs)

        return called

    passes = {"engine": "forward", "engine's gradient": "backward"}
    for name, function in passes.items():
        monkeypatch.setattr(autograd, function, listed(name, getattr(autograd, function)))
    monkeypatch.setattr(straight, "forward", listed("straight", straight.forward))
    monkeypatch.setattr(straight, "backward", listed("straight gradient", straight.backward))
    return found


@pytest.fixture(autouse=True)
def products_in_every_dtype(monkeypatch):
    """Whatever the processor: in blocks of float32 they are the engine's."""
    monkeypatch.setattr("fastpref.scoring.request.slow_reason", lambda dtype, device: None)


def inputs(dtype, needs, ignored, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    target = torch.randint(0, V, (3, N // 3), generator=generator)
    if ignored:
        target[torch.rand(target.shape, generator=generator) < 0.4] = -100
    target[2, 20] = V + 3  # NaN
    given = {"hidden": normal(3, N // 3, H), "weight": normal(V, H), "bias": normal(V)}
    for name in needs:
        given[name].requires_grad_()
    return given, target, torch.randn(target.shape, generator=generator)


def results(given, target, upstream, **arguments):
    scores = linear_logprob(given["hidden"], given["weight"], target, **arguments)
    found = {"logp": scores.logp.detach()}
    leaves = {name: one for name, one in given.items() if one.requires_grad}
    if leaves:
        own = upstream.to(scores.logp.dtype)
        gradients = torch.autograd.grad(scores.logp, list(leaves.values()), own)
        found |= dict(zip(leaves, gradients, strict=True))
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.is_contiguous()
        assert torch.equal(one.isnan(), other.isnan()), name
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), name


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("biased, map", [(False, {}), (True, {"softcap": 3.0, "logit_scale": 0.5})])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_by_the_engine(calls, monkeypatch, dtype, schedule, biased, map, ignored):
    needs, name = SCHEDULES[schedule]
    given, target, upstream = inputs(dtype, needs, ignored)
    arguments = {**map, "options": ScoringOptions(schedule=name)}
    if biased:
        arguments["bias"] = given["bias"]
    found = results(given, target, upstream, **arguments)
    assert calls == ["straight", *(["straight gradient"] if needs else [])]
    monkeypatch.setattr(straight, "serves", lambda call, model: False)
    calls.clear()
    expected = results(given, target, upstream, **arguments)
    assert calls == ["engine", *(["engine's gradient"] if needs else [])]
    same(found, expected)
    assert found["logp"].isnan().sum() == 1


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "score"])
@pytest.mark.parametrize("ignored", [False, True])
def test_rows_without_gradient_are_the_engines(calls, monkeypatch, schedule, ignored):
    needs, name = SCHEDULES[schedule]
    given, target, upstream = inputs(torch.float32, needs, ignored)
    upstream[0, 3:9] = 0
    upstream[2, 20] = 0
    options = ScoringOptions(schedule=name)
    found = results(given, target, upstream, options=options)
    assert calls == ["straight", "straight gradient", "engine's gradient"]
    monkeypatch.setattr(straight, "serves", lambda call, model: False)
    same(found, results(given, target, upstream, options=options))
    assert all(one.isfinite().all() for label, one in found.items() if label != "logp")


def lora(given):
    return torch.ones(2, H), torch.ones(V, 2), 0.5


ENGINES = {
    "entropy": lambda given: {"outputs": ("logp", "entropy")},
    "a trained bias": lambda given: {"bias": given["bias"].requires_grad_()},
    "an update": lambda given: {"lora": lora(given)},
    "temperatures": lambda given: {"temperature": torch.full((3, 1), 0.5)},
    "part of the vocabulary": lambda given: {"vocab_range": (0, V - 7)},
    "chunks": lambda given: {"options": ScoringOptions(chunk_rows=20, schedule="recompute")},
    "recomputed": lambda given: {"options": ScoringOptions(schedule="recompute")},
    "kept in part": lambda given: {"options": ScoringOptions(memory_budget=N * V * 2)},
    "plain torch": lambda given: {"options": ScoringOptions(backend="torch")},
}


@pytest.mark.parametrize("case", ENGINES)
def test_what_else_is_asked_for_is_the_engines(calls, case):
    given, target, _ = inputs(torch.float32, ("hidden", "weight"), True)
    linear_logprob(
        given["hidden"],
        given["weight"] if case != "an update" else given["weight"].detach(),
        target,
        **ENGINES[case](given),
    )
    assert calls == ["engine"]


def test_operands_that_lie_otherwise_are_the_engines(calls):
    given, target, _ = inputs(torch.float32, (), True)
    expected = linear_logprob(given["hidden"], given["weight"], target).logp
    assert calls == ["straight"]
    calls.clear()
    lying = given["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    across = given["weight"].t().contiguous().t()
    for hidden, weight in ((lying, given["weight"]), (given["hidden"], across)):
        found = linear_logprob(hidden, weight, target).logp
        torch.testing.assert_close(found, expected, equal_nan=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_logprob(given["hidden"], given["weight"], target)
    half = given["hidden"].half(), given["weight"].half()
    linear_logprob(*half, target)
    linear_logprob(given["hidden"].double(), given["weight"], target)
    assert calls == ["engine"] * 5


def test_nothing_to_score(calls):
    given, target, _ = inputs(torch.float32, ("hidden",), False)
    linear_logprob(given["hidden"], given["weight"], torch.full_like(target, -100)).logp.sum()
    assert calls == ["engine"]


@pytest.mark.parametrize("schedule", ["direct", "keep"])
def test_batches_of_gradients_and_second_derivatives(calls, schedule):
    needs, name = SCHEDULES[schedule]
    given, target, _ = inputs(torch.float64, needs, True)
    target[2, 20] = 0
    options = ScoringOptions(schedule=name)
    logp = linear_logprob(given["hidden"], given["weight"], target, options=options).logp
    hidden, own = given["hidden"], torch.randn(4, *target.shape, dtype=torch.float64)
    (batch,) = torch.autograd.grad(logp, hidden, own, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(logp, hidden, one, retain_graph=True)[0] for one in own]
    torch.testing.assert_close(batch, torch.stack(each))
    (first,) = torch.autograd.grad(logp.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "score"])
def test_memory_that_runs_out(monkeypatch, schedule):
    """At any tensor of both passes, every row with a gradient: the engine runs the call again."""
    needs, name = SCHEDULES[schedule]
    said = []
    monkeypatch.setattr(retry, "_say", lambda planned, taken: said.append((planned, taken)))

    def make():
        given, target, upstream = inputs(torch.float32, needs, True)
        target[2, 20] = 1
        options = ScoringOptions(schedule=name)

        def forward():
            return linear_logprob(given["hidden"], given["weight"], target, options=options).logp

        def backward(logp):
            torch.autograd.backward(logp, upstream)
            return {"logp": logp.detach(), **{one: given[one].grad for one in needs}}

        return refusing.Call(forward, backward)

    _, expected = refusing.run(make(), refusing.never, LEAST)
    for _, found in refusing.each_refused(make, LEAST, None):
        for label, one in found.items():
            torch.testing.assert_close(one, expected[label])
        assert len(said) == 1
        said.clear()


def test_the_preference_loss_goes_the_short_way(calls):
    given, target, _ = inputs(torch.float32, ("hidden", "weight"), True)
    target[2, 20] = 1
    hidden, target = given["hidden"][:2], target[:2]
    reference = {"ref_hidden": torch.randn(hidden.shape)}
    preference_loss(hidden, given["weight"], target, "dpo", **reference).loss.backward()
    assert calls == ["straight", "straight", "straight gradient"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_products_are_seen_and_counted(calls, schedule):
    needs, name = SCHEDULES[schedule]
    given, target, upstream = inputs(torch.float32, needs, True)
    options = ScoringOptions(schedule=name)
    plan = explain(given["hidden"], given["weight"], target, options=options)
    with FlopCounterMode(display=False) as counter:
        results(given, target, upstream, options=options)
    assert "engine" not in calls
    scored = int((target != -100).sum())
    assert counter.get_total_flops() == plan.units * 2 * scored * H * V


def test_two_passes_after_batches_that_found_no_memory(calls, monkeypatch):
    """Take less than was planned for one tile."""

    def refused(*arguments):
        raise torch.OutOfMemoryError("refused")

    given, target, _ = inputs(torch.float32, ("hidden", "weight"), True)
    target[2, 20] = 1
    arguments = {"ref_logps": torch.zeros(2), "options": ScoringOptions(schedule="batches")}
    hidden, target = given["hidden"][:2], target[:2]
    expected = preference_loss(hidden, given["weight"], target, "dpo", **arguments).loss
    calls.clear()
    monkeypatch.setattr(batches.BatchedLoss, "apply", refused)
    found = preference_loss(hidden, given["weight"], target, "dpo", **arguments).loss
    found.backward()
    assert calls == ["engine", "engine's gradient"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "score"])
@pytest.mark.parametrize("ignored", [False, True])
def test_saved_tensors_that_come_back_with_longer_rows_are_the_engines(calls, schedule, ignored):
    needs, name = SCHEDULES[schedule]
    given, target, upstream = inputs(torch.float32, needs, ignored)
    options = ScoringOptions(schedule=name)
    expected = results(given, target, upstream, options=options)
    calls.clear()

    def unpacked(tensor):
        wide = torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
        return wide if tensor.dim() > 1 else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpacked):
        found = results(given, target, upstream, options=options)
    assert calls == ["straight", "straight gradient", "engine's gradient"]
    for label, one in found.items():
        torch.testing.assert_close(one, expected[label], equal_nan=True)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "score"])
def test_autocast_around_backward_alone_rounds_nothing(calls, schedule):
    needs, name = SCHEDULES[schedule]
    given, target, upstream = inputs(torch.float32, needs, True)
    target[2, 20] = 1
    leaves = [given[one] for one in needs]
    options = ScoringOptions(schedule=name)
    logp = linear_logprob(given["hidden"], given["weight"], target, options=options).logp
    expected = torch.autograd.grad(logp, leaves, upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(logp, leaves, upstream)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_rows_are_scaled_only_where_all_have_a_gradient():
    """What the engine scales again takes neither memory nor time before."""
    given, target, upstream = inputs(torch.float32, ("weight",), False)
    options = ScoringOptions(schedule="keep")
    logp = linear_logprob(given["hidden"], given["weight"], target, options=options).logp
    upstream[:2] = 0
    scaled = []
    operator = torch.ops.fastpref.gradient_rows.default

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if function is operator:
                scaled.append(found[1].nbytes)
            return found

    with Watched():
        torch.autograd.grad(logp, [given["weight"]], upstream)
    assert scaled == [0]
