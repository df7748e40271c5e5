# SPDX-License-Identifier: Apache-2.0
"""What is kept of a call for the next one of its signature: who shares, what is not kept, and that
a kept call gives what the first one gave."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring import api, request
from fastpref.scoring.signature import Kept, signature_of
from tests.scoring.cases import BACKENDS, make_case, run, upstream_of

N, H, V = 6, 5, 23


def given(**changes):
    """The arguments of a small call."""
    arguments = {
        "hidden": torch.randn(N, H),
        "weight": torch.randn(V, H),
        "target": torch.randint(0, V, (N,)),
        "bias": None,
        "ignore_index": -100,
        "outputs": ("logp", "entropy"),
        "vocab_range": (0, 20),
        "temperature": 1.0,
        "options": ScoringOptions(),
    }
    return {**arguments, **changes}


def call(arguments):
    return linear_logprob(**arguments)


def test_values_do_not_count():
    one, other = given(), given(options=ScoringOptions(backend="auto"))
    other["hidden"] = torch.randn(H, N).t()
    assert signature_of(one) == signature_of(other) is not None
    assert hash(signature_of(one)) == hash(signature_of(other))


DIFFERENT = {
    "shape": {"hidden": torch.zeros(N, 1, H)},
    "rows of the weight": {"weight": torch.zeros(V + 1, H)},
    "dtype": {"weight": torch.zeros(V, H).double()},
    "dtype of the target": {"target": torch.zeros(N).int()},
    "layout": {"weight": torch.zeros(V, H).to_sparse()},
    "hidden's gradient": {"hidden": torch.zeros(N, H, requires_grad=True)},
    "the weight's gradient": {"weight": torch.zeros(V, H, requires_grad=True)},
    "bias": {"bias": torch.zeros(V)},
    "ignore_index": {"ignore_index": -1},
    "float for int": {"ignore_index": -100.0},
    "outputs": {"outputs": ("logp",)},
    "order of outputs": {"outputs": ("entropy", "logp")},
    "int for float": {"temperature": 1},
    "bool for float": {"temperature": True},
    "bool inside a tuple": {"vocab_range": (False, 20)},
    "float inside a tuple": {"vocab_range": (0, 20.0)},
    "numbers": {"vocab_range": (1, 20)},
    "no options": {"options": None},
    "name": {"chunks": 1},
    **{
        f"option {name}": {"options": ScoringOptions(**{name: value})}
        for name, value in {
            "backend": "torch",
            "memory_budget": 1000,
            "schedule": "keep",
            "chunk_rows": 3,
            "max_scored": 6,
        }.items()
    },
}


@pytest.mark.parametrize("changes", DIFFERENT.values(), ids=DIFFERENT)
def test_what_counts(changes):
    one, other = signature_of(given()), signature_of(given(**changes))
    assert one is not None and other is not None and one != other


def test_one_is_not_true():
    signatures = {signature_of(given(softcap=value)) for value in (1, 1.0, True)}
    assert len(signatures) == 3


def test_which_argument_a_value_is_of():
    one, other = torch.zeros(V, H), torch.zeros(V, H)
    assert signature_of({"hidden": one, "weight": other}) != signature_of(
        {"bias": one, "weight": other}
    )
    assert signature_of({"hidden": one}) == signature_of({"hidden": one, "bias": None})


def test_modes_count():
    arguments, found = given(), set()
    found.add(signature_of(arguments))
    with torch.no_grad():
        found.add(signature_of(arguments))
    with torch.inference_mode():
        found.add(signature_of(arguments))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found.add(signature_of(arguments))
            with torch.autocast("cpu", enabled=False):
                found.add(signature_of(arguments))
    # Inference mode is a mode without gradients, and autocast that is off is none.
    assert len(found) == 4


class Subclass(torch.Tensor):
    pass


def fake(tensor):
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


class Text(str):
    __slots__ = ()


UNKNOWN = {
    "numpy float": {"temperature": np.float64(1)},
    "numpy int": {"ignore_index": np.int64(-100)},
    "list": {"outputs": ["logp"]},
    "range in a list": {"vocab_range": [0, 20]},
    "numpy in a tuple": {"vocab_range": (np.int64(0), 20)},
    "tuple in a tuple": {"outputs": (("logp",),)},
    "own text": {"outputs": (Text("logp"),)},
    "group": {"tp_group": object()},
    "context": {"weight_context": lambda weight, bias: None},
    "lora": {"lora": (torch.zeros(2, H), torch.zeros(V, 2), 1.0)},
    "meta": {"hidden": torch.zeros(N, H, device="meta")},
    "meta weight": {"weight": torch.zeros(V, H, device="meta")},
    "fake": {"hidden": fake(torch.zeros(N, H))},
    "subclass": {"weight": torch.zeros(V, H).as_subclass(Subclass)},
    "array": {"hidden": np.zeros((N, H))},
}


@pytest.mark.parametrize("changes", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_plain_is_not_kept(changes):
    assert signature_of(given(**changes)) is None


def test_transforms_are_not_kept():
    arguments = given()
    seen = []

    def look(hidden):
        seen.append(signature_of({**arguments, "hidden": hidden}))
        seen.append(signature_of(arguments))
        return hidden.sum()

    torch.func.grad(look)(arguments["hidden"])
    torch.func.vmap(look)(arguments["hidden"])
    assert seen == [None] * 4
    assert signature_of(arguments) is not None


def test_symbolic_sizes():
    """They have no hash."""
    arguments = given()
    tensors = [arguments[name] for name in ("hidden", "weight", "target")]
    traced = make_fx(lambda *tensors: linear_logprob(*tensors).logp, tracing_mode="symbolic")
    expected = linear_logprob(*tensors).logp
    torch.testing.assert_close(traced(*tensors)(*tensors), expected)


def test_a_sharded_tensor_is_refused_after_a_whole_one():
    """By its type alone does it differ."""

    class DTensor(torch.Tensor):
        pass

    arguments = given()
    call(arguments)
    for name in ("hidden", "weight"):
        with pytest.raises(ValueError, match=f"{name}.*DTensor"):
            call({**arguments, name: arguments[name].as_subclass(DTensor)})


def test_fake_and_real_calls_do_not_mix():
    arguments = given()
    tensors = [arguments[name] for name in ("hidden", "weight", "target")]

    def whole():
        with FakeTensorMode() as mode:
            return api.ask(*map(mode.from_tensor, tensors)).request.whole

    for _ in range(2):
        assert not api.ask(*tensors).request.whole
        assert whole()


def counted(monkeypatch):
    """What is checked, and what is planned, from now on."""
    found = {"checked": 0, "planned": 0}
    make, plan = api.make_request, request._planned

    def make_request(*args, **kwargs):
        found["checked"] += 1
        return make(*args, **kwargs)

    def planned(*args, **kwargs):
        found["planned"] += 1
        return plan(*args, **kwargs)

    monkeypatch.setattr(api, "make_request", make_request)
    monkeypatch.setattr(request, "_planned", planned)
    return found


def test_a_call_is_checked_and_planned_once(monkeypatch):
    found, arguments = counted(monkeypatch), given()
    for _ in range(3):
        call({**arguments, "hidden": torch.randn(N, H)})
        assert found == {"checked": 1, "planned": 1}
    # So many scored tokens have a plan of their own.
    arguments["target"][2] = -100
    for _ in range(2):
        call(arguments)
        assert found == {"checked": 1, "planned": 2}
    for _ in range(2):
        call({**arguments, "temperature": torch.full((N,), 2.0)})
        assert found == {"checked": 1, "planned": 3}


@pytest.mark.parametrize(
    "options", [{"memory_budget": 3000}, {"chunk_rows": 2}, {"max_scored": 6}], ids=str
)
def test_other_options_are_planned_anew(monkeypatch, options):
    found, arguments = counted(monkeypatch), given()
    call(arguments)
    for _ in range(2):
        call({**arguments, "options": ScoringOptions(**options)})
    assert found == {"checked": 2, "planned": 2}
    call(arguments)
    assert found == {"checked": 2, "planned": 2}


def test_a_bound_on_scored_tokens_holds_for_kept_calls():
    """It is a matter of values."""
    arguments = given(options=ScoringOptions(max_scored=4))
    few = arguments["target"].clone()
    few[:2] = -100
    call({**arguments, "target": few})
    for _ in range(2):
        with pytest.raises(ValueError, match="max_scored"):
            call(arguments)
    call({**arguments, "target": few})


BAD = {
    "temperature": {"temperature": 0.0},
    "nan": {"temperature": float("nan")},
    "vocab_range": {"vocab_range": (0, V + 1)},
    "outputs": {"outputs": ("logq",)},
    "shape": {"weight": torch.zeros(V, H + 1)},
    "dtype": {"hidden": torch.zeros(N, H).long()},
    "True": {"ignore_index": True},
    "options": {"options": "keep"},
    "unhashable": {"outputs": ("logp", ["lse"])},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_what_raises_is_not_kept(changes):
    arguments, messages = given(), []
    for _ in range(2):
        with pytest.raises((ValueError, TypeError)) as error:
            call({**arguments, **changes})
        messages.append(str(error.value))
        call(arguments)
    assert messages[0] == messages[1] and "hash" not in messages[0]
    assert len(api._KEPT._found) == 1


@pytest.mark.parametrize("name", ["hidden", "weight", "target", "bias", "temperature"])
def test_no_tensor_is_kept_alive(name):
    arguments = given(bias=torch.randn(V), temperature=torch.ones(N))
    for one in (arguments["hidden"], arguments["weight"]):
        one.requires_grad_()
    call(arguments).logp.sum().backward()
    reference = weakref.ref(arguments.pop(name))
    del one
    gc.collect()
    assert api._KEPT._found and reference() is None


def test_their_number_is_bounded():
    kept, made = Kept(3), []

    def find():
        made.append(len(made))
        return made[-1]

    assert [kept.of((at,), find) for at in (1, 2, 3, 1, 2, 3)] == [0, 1, 2, 0, 1, 2]
    assert kept.of((4,), find) == 3
    assert len(kept._found) <= 3 and kept.of((4,), find) == 3
    assert [kept.of(None, find) for _ in range(2)] == [4, 5]
    kept.forget()
    assert kept.of((4,), find) == 6


def test_calls_of_many_signatures(monkeypatch):
    """As sequences of any length make them."""
    monkeypatch.setattr(api, "_KEPT", Kept(4))
    weight = torch.randn(V, H)
    for rows in (*range(1, 12), *range(11, 0, -1)):
        hidden, target = torch.randn(rows, H), torch.randint(0, V, (rows,))
        found = linear_logprob(hidden, weight, target).logp
        expected = (hidden @ weight.t()).log_softmax(1)[torch.arange(rows), target]
        torch.testing.assert_close(found, expected)
        assert len(api._KEPT._found) <= 4


def test_few_plans_of_one_signature(monkeypatch):
    """Batches of one shape that each score another number of tokens."""
    monkeypatch.setattr(api, "_KEPT", Kept(4))
    arguments = given(
        hidden=torch.randn(40, H), target=torch.randint(0, V, (40,)), vocab_range=None
    )
    for scored in range(40):
        arguments["target"][scored] = -100
        call(arguments)
        (checked,) = api._KEPT._found.values()
        assert 1 <= len(checked.plans._found) <= api.MOST_PLANS


def test_threads():
    """Calls of several signatures at once, of which few are kept."""
    problems = []
    cases = [make_case(rows, dtype=torch.float32, vocab=97, ignored=0.3) for rows in (3, 5, 8)]
    upstream = [upstream_of(case, ("logp",)) for case in cases]
    expected = [run(case, upstream=one) for case, one in zip(cases, upstream, strict=True)]

    def work(first):
        try:
            for at in range(60):
                which = (first + at) % 3
                found = run(cases[which], upstream=upstream[which])
                if not all(torch.equal(found[name], expected[which][name]) for name in found):
                    problems.append(which)
                if at % 10 == 0:
                    api._KEPT.forget()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["auto", "keep", "recompute"])
@pytest.mark.parametrize("uneven", [False, True])
def test_a_kept_call_gives_what_the_first_gave(backend, schedule, uneven):
    """To the last bit, whatever other calls of its signature lie between."""
    options = ScoringOptions(backend=backend, schedule=schedule)
    arguments = {"rows": 11, "vocab": 97, "dtype": torch.float32, "uneven": uneven}
    names = ("logp", "entropy", "lse")
    cases = [make_case(ignored=share, seed=7, **arguments) for share in (0.0, 0.4, 0.99)]

    def results(case):
        upstream = upstream_of(case, names)
        return run(case, options=options, outputs=names, upstream=upstream)

    first = []
    for case in cases:
        api._KEPT.forget()
        first.append(results(case))
    for order in ((0, 1, 2), (2, 1, 0)):
        for at in order:
            for name, value in results(cases[at]).items():
                assert torch.equal(value, first[at][name]), name


def test_modes_that_change_between_calls():
    """Without gradients nothing is kept for backward, with them it is, and under autocast products
    are in another dtype."""
    arguments = given()
    leaves = [arguments[name].requires_grad_() for name in ("hidden", "weight")]
    expected = None
    for _ in range(3):
        with torch.inference_mode():
            assert call(arguments).logp.is_inference()
        with torch.no_grad():
            assert not call(arguments).logp.requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = call(arguments).logp
        logp = call(arguments).logp
        gradients = torch.autograd.grad(logp.sum(), leaves)
        assert not torch.equal(rounded, logp)
        if expected is not None:
            for one, other in zip((logp, *gradients), expected, strict=True):
                assert torch.equal(one, other)
        expected = logp, *gradients
        hidden = arguments["hidden"].detach()
        alone = call({**arguments, "hidden": hidden}).logp
        assert torch.equal(alone, logp)
        assert torch.equal(torch.autograd.grad(alone.sum(), leaves[1:])[0], gradients[1])
