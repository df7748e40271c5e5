# SPDX-License-Identifier: Apache-2.0
"""What is kept of a call of ``linear_divergence`` for the next of its signature, and what is looked
at every time."""

import gc
import weakref

import pytest
import torch

from fastpref import ScoringOptions, explain_divergence, linear_divergence
from fastpref.scoring import api, divergence
from fastpref.scoring.signature import Kept

N, H, V = 7, 6, 19


def given(**changes):
    made = torch.Generator().manual_seed(5)
    return {
        "student_hidden": torch.randn(N, H, generator=made),
        "student_weight": torch.randn(V, H, generator=made),
        "teacher_hidden": torch.randn(N, H + 2, generator=made),
        "teacher_weight": torch.randn(V, H + 2, generator=made),
        "mask": torch.arange(N) % 3 != 0,
    } | changes


def results(arguments):
    own = {
        name: one.detach().clone().requires_grad_(name.startswith("student_"))
        if isinstance(one, torch.Tensor) and one.is_floating_point()
        else one
        for name, one in arguments.items()
    }
    value = linear_divergence(**own)
    value.square().sum().backward()
    trained = [one for one in own.values() if isinstance(one, torch.Tensor) and one.requires_grad]
    return [value, *(one.grad for one in trained)]


CASES = {
    "usual": given(),
    "all positions": given(mask=None),
    "biases": given(student_bias=torch.randn(V), teacher_bias=torch.randn(V)),
    "reverse": given(divergence="reverse_kl", temperature=2.0, softcap=30.0),
    "jsd": given(divergence="jsd", beta=0.3),
    "jsd at its end": given(divergence="jsd", beta=1.0),
    "padded": given(teacher_weight=torch.randn(V + 3, H + 2)),
    "ids below": given(vocab_size=V - 4),
    "ids of a range": given(vocab_range=(0, V - 2)),
    "recomputed": given(options=ScoringOptions(schedule="recompute")),
    "float64": {
        name: one.double() if one.is_floating_point() else one for name, one in given().items()
    },
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_a_kept_call_gives_what_the_first_gave(arguments):
    """To the last bit, and of its own tensors: others lie between."""
    first = results(arguments)
    other = {
        name: one * 0.5 if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for name, one in arguments.items()
    }
    if other["mask"] is not None:
        other["mask"] = ~other["mask"]
    between, again = results(other), results(arguments)
    assert len(divergence._KEPT._found) == 1
    divergence._KEPT.forget()
    for one, two in zip([*first, *between], [*again, *results(other)], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not torch.equal(first[0], between[0])


# Of a call that is right, what turns it wrong.
WRONG = {
    "divergence": {"divergence": "forward_lk"},
    "beta": {"divergence": "jsd", "beta": 1.5},
    "True": {"temperature": True},
    "temperature": {"temperature": 0.0},
    "mask": {"mask": torch.ones(N)},
    "rows": {"mask": torch.ones(N + 1, dtype=torch.bool)},
    "ids": {"vocab_size": V + 1},
    "teacher": {"teacher_hidden": torch.zeros(N, H)},
    "batches": {"options": ScoringOptions(schedule="batches")},
    "array": {"student_hidden": torch.zeros(N, H).numpy()},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_every_time(changes):
    said = []
    for _ in range(2):
        linear_divergence(**given())
        with pytest.raises((TypeError, ValueError)) as raised:
            linear_divergence(**given(**changes))
        said.append(str(raised.value))
    assert said[0] == said[1] and len(divergence._KEPT._found) == 1


@pytest.mark.parametrize("name", ["student_hidden", "student_weight", "teacher_weight", "mask"])
def test_no_tensor_is_kept_alive(name):
    arguments = given()
    arguments["student_weight"].requires_grad_()
    linear_divergence(**arguments).sum().backward()
    reference = weakref.ref(arguments.pop(name))
    gc.collect()
    assert divergence._KEPT._found and reference() is None


def test_what_a_gradient_is_needed_of_is_looked_at():
    arguments = given()
    assert not linear_divergence(**arguments).requires_grad
    arguments["teacher_hidden"].requires_grad_()
    assert not linear_divergence(**arguments).requires_grad
    arguments["student_hidden"].requires_grad_()
    linear_divergence(**arguments).sum().backward()
    assert arguments["student_hidden"].grad is not None and arguments["teacher_hidden"].grad is None
    with torch.no_grad():
        assert not linear_divergence(**arguments).requires_grad


def test_plans_are_kept_by_the_number_of_rows(monkeypatch):
    monkeypatch.setattr(divergence, "_KEPT", Kept(4))
    for scored in range(N):
        mask = torch.arange(N) < scored
        plan = explain_divergence(**given(mask=mask))
        assert plan.scored == scored
        (known,) = divergence._KEPT._found.values()
        assert 1 <= len(known.asked.plans._found) <= api.MOST_PLANS
