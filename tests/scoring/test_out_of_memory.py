# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out, at every tensor that a call makes in turn: the call runs again with less,
and is as right as before."""

import gc
import logging
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import ScoringOptions, linear_divergence, linear_logprob
from fastpref.scoring import autograd, operators, products, retry, workspace
from fastpref.scoring import plan as schedule
from fastpref.scoring.api import ask
from fastpref.scoring.backends.column_sums import FEW_ROWS
from fastpref.scoring.request import make_request, plan_target
from fastpref.scoring.rules.compared import WithMixture
from fastpref.scoring.rules.scores import Scores
from tests.scoring import refusing
from tests.scoring.cases import (
    BACKENDS,
    INPUTS,
    check_contract,
    check_scores,
    make_case,
    references,
    upstream_of,
)
from tests.scoring.divergences import divergence

N, H, V = 300, 12, 2051
HELD = N * V  # elements of all exponentials
LEAST = 4096  # bytes: matrices, and not vectors of N
BOTH = ("hidden", "weight")
ENTROPY = ("logp", "entropy")
CASE = {"rows": N, "hidden": H, "vocab": V, "bias": True, "ignored": 0.1}


def least_tile(dtype):
    return schedule.LEAST_ROWS * schedule.LEAST_COLS * dtype.itemsize


SCHEDULES = {
    "score": {"needs": ()},
    "statistics": {"needs": (), "outputs": ("logp", "entropy", "mean_logits", "is_top1")},
    "direct": {"needs": ("hidden",)},
    "keep": {"schedule": "keep"},
    "keep, entropy": {"schedule": "keep", "outputs": ENTROPY},
    "keep, frozen": {"schedule": "keep", "needs": ("hidden",)},
    "keep/recompute": {"schedule": "keep", "share": 0.7},
    "recompute": {"schedule": "recompute"},
    "recompute, small": {"schedule": "recompute", "share": 0.1},
}
DTYPES = (torch.float32, torch.bfloat16)
SAMPLE = 7  # of the tensors; the slow sweep refuses them all


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Every plan that did not fit, and what ran instead."""
    found = []
    monkeypatch.setattr(retry, "_say", lambda planned, taken: found.append((planned, taken)))
    return found


def facts(name, dtype, backend="auto"):
    """Of a case, its arguments, and ``make`` of a call on inputs of its own."""
    given = dict(SCHEDULES[name])
    needs, outputs = given.pop("needs", INPUTS), given.pop("outputs", ("logp",))
    share = given.pop("share", 2)
    budget = int(share * HELD * dtype.itemsize)
    options = ScoringOptions(memory_budget=budget, backend=backend, **given)
    case = make_case(dtype=dtype, **CASE)
    differentiated = tuple(name for name in outputs if name in ENTROPY) if needs else ()
    upstream = upstream_of(case, differentiated)

    def make():
        inputs = {one: getattr(case, one).clone().requires_grad_(one in needs) for one in INPUTS}
        bias, target = inputs["bias"], case.target.clone()

        def forward():
            scores = linear_logprob(
                inputs["hidden"],
                inputs["weight"],
                target,
                bias=bias,
                outputs=outputs,
                options=options,
            )
            return {one: getattr(scores, one) for one in outputs}

        def backward(scores):
            found = {one: value.detach() for one, value in scores.items()}
            if needs:
                tensors = [scores[one] for one in differentiated]
                gradients = [upstream[one].to(scores[one]) for one in differentiated]
                torch.autograd.backward(tensors, gradients, retain_graph=True)
                found |= {f"d {one}": inputs[one].grad for one in needs}
            return found

        return refusing.Call(forward, backward)

    def check(found):
        check_scores(case, found, *references(dtype, outputs, differentiated, **CASE))

    return SimpleNamespace(make=make, check=check, options=options)


def sweep(call, said, most):
    undisturbed = refusing.run(call.make(), refusing.never, LEAST)[1]
    for number, found in refusing.each_refused(call.make, LEAST, most):
        ((planned, taken),) = said
        said.clear()
        if str(planned) == str(taken):
            # Nothing less to take, and memory was there at the second try.
            assert all(torch.equal(found[one], undisturbed[one]) for one in found), number
        call.check(found)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_any_tensor_may_be_refused(name, dtype, said):
    sweep(facts(name, dtype), said, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_tensor_refused_in_turn(name, dtype, backend, said):
    sweep(facts(name, dtype, backend), said, None)


# What no plan takes less of: a gradient of the weight, and products of 16-bit slabs in float32.
FIXED = V * H * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if "small" not in name])
def test_an_allocator_with_little_ends_in_the_least_tile(name, dtype, said):
    """No tensor may be larger than the least tile, or than a slab of float32 for the bias."""
    call = facts(name, dtype)
    limit = max(least_tile(dtype), FIXED, FEW_ROWS * V * 4)
    mode, found = refusing.run(call.make(), refusing.above(limit), LEAST)
    assert mode.refused and not mode.leaked
    assert said[-1][1].forward_tile.nbytes(dtype.itemsize) <= limit
    call.check(found)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made in each dtype."""

    def __init__(self):
        super().__init__()
        self.nbytes = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        given = {refusing._place(one) for one in refusing._tensors((args, kwargs or {}))}
        for one in refusing._tensors(found):
            if refusing._place(one) not in given:
                made = one.untyped_storage().nbytes()
                self.nbytes[one.dtype] = max(self.nbytes[one.dtype], made)
        return found


@pytest.mark.heavy
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", [4, 20])
def test_gradients_of_the_weight_add_up_in_little(budget, weight_dtype, monkeypatch):
    """Of a budget in MiB that holds some or all exponentials. What adds up in float32 is a slab, or
    the gradient itself; what is rounded before it does, a part of a product."""
    monkeypatch.setattr(products, "PRODUCT_BYTES", 1 << 18)
    rows, hidden_size, vocab = 300, 512, 8192
    hidden = torch.randn(rows, hidden_size, dtype=torch.bfloat16, device="cpu").requires_grad_()
    weight = torch.randn(vocab, hidden_size, dtype=weight_dtype, device="cpu") / 16
    leaves = [hidden, weight.requires_grad_()]
    target = torch.randint(vocab, (rows,), device="cpu")
    options = ScoringOptions(schedule="keep", memory_budget=budget << 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprob(*leaves, target, options=options).logp
    upstream = torch.randn(rows, device="cpu")
    with Largest() as largest:
        found = torch.autograd.grad(logp, leaves, upstream)
    exact = [one.detach().double().requires_grad_() for one in leaves]
    logits = exact[0] @ exact[1].bfloat16().double().t()
    scores = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    wanted = torch.autograd.grad(scores, exact, upstream.double())
    for one, want in zip(found, wanted, strict=True):
        assert (one - want).norm() < 6e-3 * want.norm()
    slab, total = schedule.LEAST_COLS * hidden_size * 4, vocab * hidden_size
    wide, half = largest.nbytes[torch.float32], largest.nbytes[torch.bfloat16]
    if weight_dtype == torch.float32:
        assert wide == 4 * total and half < total
    else:
        assert wide <= slab and half == 2 * total


TWO_HEADS = {
    "score": {"needs": ()},
    "direct": {"needs": ("hidden",)},
    "keep": {},
    "keep in part": {"share": 0.7},
    "recompute": {"schedule": "recompute"},
}
KIND = "jsd", 0.3


def two_heads(name, dtype):
    given = dict(TWO_HEADS[name])
    needs, share = given.pop("needs", BOTH), given.pop("share", 4)
    options = ScoringOptions(memory_budget=int(share * HELD * dtype.itemsize), **given)
    ours, theirs = (make_case(dtype=dtype, **CASE | {"seed": seed}) for seed in (0, 1))
    mask, upstream = ours.scored, upstream_of(ours, ("logp",))["logp"]

    def finish(value, leaves, retain=False):
        found = {"value": value.detach()}
        if needs:
            torch.autograd.backward([value], [upstream.to(value)], retain_graph=retain)
            found |= {f"d {one}": leaves[one].grad for one in needs}
        return found

    def make():
        leaves = {one: getattr(ours, one).clone().requires_grad_(one in needs) for one in BOTH}

        def forward():
            return linear_divergence(
                *leaves.values(),
                theirs.hidden,
                theirs.weight,
                mask,
                divergence=KIND[0],
                beta=KIND[1],
                student_bias=ours.bias,
                options=options,
            )

        return refusing.Call(forward, lambda value: finish(value, leaves, retain=True))

    def plain(dtype):
        leaves = {
            one: getattr(ours.to(dtype), one).clone().requires_grad_(one in needs) for one in BOTH
        }
        wide = torch.promote_types(dtype, torch.float32)
        other = theirs.to(dtype)
        student = (leaves["hidden"] @ leaves["weight"].t()).to(wide) + ours.bias.to(wide)
        teacher = (other.hidden @ other.weight.t()).to(wide)
        return finish(torch.where(mask, divergence(student, teacher, *KIND), 0), leaves)

    eager, exact = plain(dtype), plain(torch.float64)
    return SimpleNamespace(
        make=make, check=lambda found: check_contract(found, eager, exact), options=options
    )


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TWO_HEADS)
def test_any_tensor_of_two_heads(name, dtype, said):
    sweep(two_heads(name, dtype), said, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TWO_HEADS)
def test_every_tensor_of_two_heads(name, dtype, said):
    sweep(two_heads(name, dtype), said, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_heads_end_in_the_least_tile(dtype, said):
    """64 rows of each."""
    call = two_heads("keep", dtype)
    limit = 2 * schedule.LEAST_ROWS * V * dtype.itemsize
    mode, found = refusing.run(call.make(), refusing.above(limit), LEAST)
    assert mode.refused and not mode.leaked
    taken = said[-1][1]
    assert f"MiB, {schedule.GIVEN})" in str(said[0][0])
    assert f"MiB, {schedule.RAN_OUT})" in str(taken)
    assert (
        taken.forward_tile.rows == schedule.LEAST_ROWS
        and taken.kept_rows <= 2 * schedule.LEAST_ROWS
    )
    call.check(found)


def test_logits_mixed_of_two_heads(said):
    ours, theirs = (make_case(dtype=torch.float32, **CASE | {"seed": seed}) for seed in (0, 1))

    def make():
        models = [ask(one.hidden, one.weight, ours.target).models[0] for one in (ours, theirs)]
        request = make_request(models, ignore_index=-100, options=None)
        rule = WithMixture(Scores(("logp",), ()), Scores(("logp",), ()), 0.1)
        call = plan_target(request, rule, models, ours.target)

        def forward():
            return autograd.run(call, models)

        def finish(found):
            named = zip(rule.output_names, found, strict=True)
            return {name: one for name, one in named if name in rule.outputs}

        return refusing.Call(forward, finish)

    undisturbed = refusing.run(make(), refusing.never, LEAST)[1]
    for _, found in refusing.each_refused(make, LEAST, None):
        assert said.pop()[1].forward_tile.rows < N
        torch.testing.assert_close(found, undisturbed)


def trained():
    """Hidden, weight and bias, and targets."""
    case = make_case(dtype=torch.float32, **CASE)
    return [getattr(case, one).clone().requires_grad_() for one in INPUTS], case.target


def kept_call(leaves, target, **changes):
    arguments = {"bias": leaves[2], "options": ScoringOptions(schedule="keep"), **changes}
    return linear_logprob(*leaves[:2], target, **arguments).logp


def test_a_second_backward_is_right_after_one_gave_the_exponentials_back(said):
    leaves, target = trained()
    logp = kept_call(leaves, target)
    upstream = [torch.randn(N) for _ in range(3)]
    want = [torch.autograd.grad(logp, leaves, one, retain_graph=True) for one in upstream]
    for number, (one, other) in enumerate(zip(upstream, want, strict=True)):
        with refusing.Refusing(refusing.at(0 if number == 1 else -1), LEAST):
            got = torch.autograd.grad(logp, leaves, one, retain_graph=number < 2)
        assert len(said) == (number > 0)
        torch.testing.assert_close(got, other)
    assert said[0][1].schedule == "recompute"


def test_exponentials_are_gone_before_backward_tries_again(monkeypatch):
    """Their buffer goes back to the system, though the graph still has the tensor."""
    leaves, target = trained()
    workspace.release_workspace()
    logp = kept_call(leaves, target)
    held = int((target >= 0).sum()) * V * 4
    assert not any(one.nbytes >= held for one in workspace._idle())
    release, released = workspace.release_workspace, []

    def released_by():
        released.extend(one.nbytes for one in workspace._idle())
        release()

    monkeypatch.setattr(workspace, "release_workspace", released_by)
    with refusing.Refusing(refusing.at(0), LEAST):
        logp.sum().backward(retain_graph=True)
    assert held in released
    assert logp.grad_fn.saved_tensors[-1].shape == (0, V)


def refused_lease(monkeypatch):
    """The next buffer is refused; modes see operators from outside only."""
    take, left = workspace._take, [1]

    def refused(nbytes):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("no room for a buffer")
        return take(nbytes)

    monkeypatch.setattr(workspace, "_take", refused)
    return left


@pytest.mark.parametrize("passes", ["forward", "backward", "both"])
def test_compiled_operators_leave_what_they_were_given(passes, monkeypatch, said):
    """Kept exponentials belong to the graph there; their rows are recomputed without them."""
    (hidden, weight, bias), target = trained()
    leaves = [hidden, weight, bias]
    asked = ask(hidden, weight, target, bias=bias)

    def call():
        return operators.SCORES.run(*asked[:3], target)[0]

    # Kept rows without gradient make the others pass through a buffer.
    want = torch.autograd.grad(call()[::2].sum(), leaves)
    if passes != "backward":
        refused_lease(monkeypatch)
    logp = call()
    if passes != "forward":
        refused_lease(monkeypatch)
    got = torch.autograd.grad(logp[::2].sum(), leaves, retain_graph=True)
    assert len(said) == 1 + (passes == "both")
    if passes == "backward":
        shapes = [one.shape for one in logp.grad_fn.saved_tensors if one is not None]
        assert ((target >= 0).sum(), V) in shapes
    again = torch.autograd.grad(logp[::2].sum(), leaves)
    torch.testing.assert_close((got, again), (want, want))


def test_it_is_said_once(monkeypatch, caplog):
    monkeypatch.undo()
    retry._said.clear()
    given = trained()
    for _ in range(2):
        with refusing.Refusing(refusing.at(1), LEAST), caplog.at_level(logging.WARNING):
            kept_call(*given)
    (message,) = caplog.messages
    assert caplog.records[0].name == "fastpref"
    for part in ("out of memory: keep on", "ran again as keep/recompute on", "memory_budget=...)"):
        assert part in message


def test_no_room_at_all():
    """What the first error said, the least plan, and the last error as cause."""
    given = trained()
    with (
        pytest.raises(torch.OutOfMemoryError) as caught,
        refusing.Refusing(refusing.above(5 * N * H), LEAST) as mode,
    ):
        kept_call(*given)
    message = str(caught.value)
    assert message.startswith("no room for aten.empty") and "the last attempt too" in message
    assert "recompute on" in message and "Free memory" in message
    cause = caught.value.__cause__
    assert isinstance(cause, torch.OutOfMemoryError) and cause.__traceback__.tb_next is not None
    assert 2 < mode.refused < 12


def test_what_fails_for_another_reason_is_not_repeated():
    """Nor is its memory kept: the frames of an error hold what they made."""
    attempts = []

    def attempt(plan):
        attempts.append(plan)
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        retry.with_less(attempt, 3, lambda plan: plan - 1, torch.device("cpu"))
    assert attempts == [3]


def test_a_call_inside_a_call_leaves_nothing_either(said):
    """As an objective that scores: the last error of the inner call is the cause of its own."""
    cpu, made, left = torch.device("cpu"), [], []

    def inner(plan):
        large = torch.empty(1 << 20, dtype=torch.uint8, device="cpu")
        made.append(weakref.ref(large))
        raise torch.OutOfMemoryError(f"no room {large.numel()}")

    def outer(plan):
        if plan == 2:
            retry.with_less(inner, 2, lambda plan: plan - 1 or None, cpu)
        left.extend(one() for one in made)

    gc.disable()
    try:
        retry.with_less(outer, 2, lambda plan: plan - 1 or None, cpu)
    finally:
        gc.enable()
    assert left == [None, None] and said == [(2, 1)]


@pytest.mark.parametrize("backward", [False, True])
def test_under_tp_group_nothing_runs_again(backward, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        pattern = r"(?s)no room.*under tp_group.*memory_budget=\.\.\.\) on every rank"
        group = torch.distributed.group.WORLD
        given = trained()
        if backward:
            logp = kept_call(*given, tp_group=group)
            kept_before = logp.grad_fn.saved_tensors[-1].shape
        with (
            pytest.raises(torch.OutOfMemoryError, match=pattern) as caught,
            refusing.Refusing(refusing.at(1), LEAST) as mode,
        ):
            if backward:
                logp.sum().backward(retain_graph=True)
            else:
                kept_call(*given, tp_group=group)
        assert mode.refused == 1 and "keep on" in str(caught.value)
        if backward:
            assert logp.grad_fn.saved_tensors[-1].shape == kept_before
    finally:
        torch.distributed.destroy_process_group()
