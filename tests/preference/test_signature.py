# SPDX-License-Identifier: Apache-2.0
"""What is kept of a call for the next of its signature, and what is looked at every time."""

import gc
import weakref

import pytest
import torch

from fastpref import ScoringOptions, objectives, preference_loss
from fastpref.objectives import Objective
from fastpref.preference import task
from fastpref.scoring.signature import Kept

B, T, H, V = 4, 5, 6, 17


def given(**changes):
    made = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(B, T, H, generator=made),
        "weight": torch.randn(V, H, generator=made),
        "target": torch.randint(0, V, (B, T), generator=made),
        "objective": "dpo",
        "ref_logps": torch.randn(B, generator=made),
    } | changes


def with_reference(**changes):
    made = torch.Generator().manual_seed(4)
    head = {
        "ref_hidden": torch.randn(B, T, H + 1, generator=made),
        "ref_weight": torch.randn(V, H + 1, generator=made),
        "ref_bias": torch.randn(V, generator=made),
    }
    return given(ref_logps=None, **head) | changes


def results(arguments):
    """The output, and the gradients of what is trained."""
    names = ("hidden", "weight", "bias", "token_weights")
    own = {
        name: one.detach().clone().requires_grad_(name in names and one.is_floating_point())
        if isinstance(one, torch.Tensor)
        else one
        for name, one in arguments.items()
    }
    found = preference_loss(**own)
    found.loss.sum().backward()
    gradients = [own[name].grad for name in names if own.get(name) is not None]
    return [
        found.loss,
        found.losses,
        found.rewards,
        found.logps,
        *found.metrics.values(),
    ], gradients


CASES = {
    "sums of a reference": given(),
    "reference": with_reference(),
    "reference, the same head": with_reference(
        ref_hidden=torch.ones(B, T, H), ref_weight=None, ref_bias=None, bias=torch.ones(V)
    ),
    "both models side by side": with_reference(objective="tdpo"),
    "mixed logits": with_reference(objective="epsilon_dpo"),
    "entropy of the reference": with_reference(objective="mallows_po"),
    "hyperparameters": given(beta=0.3, label_smoothing=0.1),
    "token weights": given(
        token_weights=torch.rand(B, T), ref_logps=torch.zeros(B, T), reduction="sum"
    ),
    "extras": given(objective="madpo", extras={"reward_margin": torch.tensor([0.5, 2.0])}),
    "lists": given(
        objective="lipo", layout="groups", group_size=2, extras={"scores": torch.eye(2)}
    ),
    "tokens": given(objective="grpo", ref_logps=None, extras={"advantages": torch.randn(B)}),
    "outputs": given(outputs=("entropy", "accuracy"), layout="interleaved"),
    "packed rows of (1, N)": given(
        cu_seqlens=torch.tensor([0, 3, 5, 12, B * T]),
        hidden=given()["hidden"].view(1, B * T, H),
        target=given()["target"].view(1, B * T),
    ),
    "batches": given(options=ScoringOptions(schedule="batches")),
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_a_kept_call_gives_what_the_first_gave(arguments):
    """To the last bit, and of its own tensors: others lie between."""
    first, gradients = results(arguments)
    kept = 0 if "cu_seqlens" in arguments else 1
    assert len(task._KEPT._found) == kept
    other = {
        name: one * 0.5 if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for name, one in arguments.items()
    }
    between, _ = results(other)
    again, gradients_again = results(arguments)
    assert len(task._KEPT._found) == kept
    for one, two in zip([*first, *gradients], [*again, *gradients_again], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not torch.equal(first[3], between[3])  # logps
    task._KEPT.forget()
    fresh, _ = results(other)
    for one, two in zip(between, fresh, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def error_of(arguments):
    with pytest.raises((TypeError, ValueError)) as raised:
        preference_loss(**arguments)
    return str(raised.value)


# Of a call that is right, what turns it wrong; most leave every shape and dtype as it is.
WRONG = {
    "objective": {"objective": "dp0"},
    "hyperparameter": {"beta": -1.0},
    "True": {"beta": True},
    "one a unit": {"beta": torch.tensor([0.1, -0.1])},
    "extra": {"extras": {"reward_margin": 1.0}},
    "extra without a name": {"extras": {1: torch.zeros(2)}},
    "extras": {"extras": [torch.zeros(2)]},
    "two references": {"extras": {"ref_token_logp": torch.zeros(B, T)}},
    "denominator": {"denominator": torch.tensor(0.0)},
    "rows of pairs": {"layout": torch.tensor([[0, 1], [2, B]])},
    "temperatures": {"temperature": torch.tensor([[1.0], [0.0], [1.0], [1.0]])},
    "boundaries": {"cu_seqlens": torch.tensor([0, 1, 3, 2, T])},
    "reference": {"ref_logps": torch.zeros(B + 1)},
    "integers": {"ref_logps": torch.zeros(B, dtype=torch.int64)},
    "reduction": {"reduction": "average"},
    "group size": {"group_size": 2},
    "outputs": {"outputs": ("entropie",)},
    "ignore_index": {"ignore_index": 1.5},
    "softcap": {"softcap": -1.0},
    "hidden": {"hidden": torch.zeros(B, T, H + 1)},
    "options": {"options": "keep"},
}
# The same call with values that are right.
RIGHT = {
    "one a unit": {"beta": torch.tensor([0.1, 0.1])},
    "denominator": {"denominator": torch.tensor(1.0)},
    "rows of pairs": {"layout": torch.tensor([[0, 1], [2, 3]])},
    "temperatures": {"temperature": torch.ones(B, 1)},
    "boundaries": {"cu_seqlens": torch.tensor([0, 1, 2, 3, T])},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_every_time(name):
    changes, arguments = WRONG[name], given()
    right = RIGHT.get(name, {})
    if "cu_seqlens" in changes:
        arguments |= {key: arguments[key][0] for key in ("hidden", "target")}
    said = error_of({**arguments, **changes})
    for _ in range(2):
        preference_loss(**{**arguments, **right})
        assert error_of({**arguments, **changes}) == said
    assert all(known.objective.name == "dpo" for known in task._KEPT._found.values())


def test_a_weight_that_has_lost_its_memory():
    arguments = given()
    preference_loss(**arguments)
    freed = torch.randn(V, H)
    freed.untyped_storage().resize_(0)
    assert "weight" in error_of({**arguments, "weight": freed})


def test_of_what_the_caller_made_nothing_is_kept():
    """But what is set in an objective of the package."""
    own = Objective(lambda chosen, rejected: -(chosen - rejected), unit="pair", scope="pair")
    for objective in (own, own.function):
        preference_loss(**given(objective=objective, ref_logps=None))
    beta = objectives.get("dpo", beta=torch.full((B // 2,), 0.1))
    preference_loss(**given(objective=beta))
    assert not task._KEPT._found
    objective = objectives.get("dpo", beta=0.3)
    preference_loss(**given(objective=objective))
    (known,) = task._KEPT._found.values()
    assert known.objective == objective and known.objective is not objective


def test_what_is_given_is_not_made_and_what_is_not_is():
    extras = {"ref_entropy": torch.full((B // 2,), 0.5)}
    arguments = with_reference(objective="mallows_po")
    first = preference_loss(**arguments, extras=extras).loss
    other = preference_loss(**arguments).loss
    assert not torch.equal(first, other)
    assert torch.equal(preference_loss(**arguments, extras=extras).loss, first)


@pytest.mark.parametrize("objective", ["dpo", "tdpo"])
def test_a_reference_has_no_gradient(objective):
    arguments = with_reference(objective=objective)
    arguments["ref_hidden"].requires_grad_()
    for _ in range(2):
        assert not preference_loss(**arguments).loss.requires_grad


@pytest.mark.parametrize("name", ["hidden", "weight", "target", "bias", "ref_hidden", "ref_weight"])
def test_no_tensor_is_kept_alive(name):
    arguments = with_reference(bias=torch.zeros(V))
    arguments["hidden"].requires_grad_()
    preference_loss(**arguments).loss.backward()
    reference = weakref.ref(arguments.pop(name))
    gc.collect()
    assert task._KEPT._found and reference() is None


def test_what_a_gradient_is_needed_of_is_looked_at():
    """Of the same shapes, values and options."""
    arguments = given()
    assert not preference_loss(**arguments).loss.requires_grad
    arguments["weight"].requires_grad_()
    preference_loss(**arguments).loss.backward()
    assert arguments["weight"].grad is not None
    with torch.no_grad():
        assert not preference_loss(**arguments).loss.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert len(task._KEPT._found) == 3
        rounded = preference_loss(**arguments).loss
    assert len(task._KEPT._found) == 4
    assert not torch.equal(rounded, preference_loss(**arguments).loss)


def test_their_number_is_bounded(monkeypatch):
    monkeypatch.setattr(task, "_KEPT", Kept(3))
    for beta in range(1, 9):
        preference_loss(**given(beta=beta / 10))
        assert len(task._KEPT._found) <= 3
