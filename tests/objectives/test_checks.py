# SPDX-License-Identifier: Apache-2.0
"""What arguments are told apart by."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from fastpref import objectives
from fastpref.objectives import checks


@pytest.mark.parametrize(
    "value", [1, -2.5, np.float16(1), np.float32(1), np.float64(1), np.int8(3), Fraction(1, 2)]
)
def test_numbers(value):
    assert checks.is_number(value)
    own = checks.as_python(value)
    assert type(own) in (int, float) and own == value


@pytest.mark.parametrize(
    "value", [True, np.bool_(False), "1", None, 1j, np.complex64(1), np.array([1.0]), [1]]
)
def test_what_is_no_number(value):
    assert not checks.is_number(value) and not checks.is_integer(value)
    assert checks.as_python(value) is value


def test_integers():
    for value in (0, np.int64(3), np.uint8(3), np.int32(-1)):
        assert checks.is_integer(value)
    for value in (1.0, np.float32(1)):
        assert not checks.is_integer(value)


def test_hints():
    known = ("keep", "recompute", "forward_kl")
    assert checks.hint("Keep", known) == "; did you mean 'keep'?"
    assert checks.hint("forward-kl", known) == "; did you mean 'forward_kl'?"
    assert checks.hint("recompte", known) == "; did you mean 'recompute'?"
    assert checks.hint("sigmoid", known, {"sigmoid": "keep"}) == "; did you mean 'keep'?"
    assert checks.hint("xyz", known) == checks.hint(3, known) == checks.hint(None, known) == ""


def test_what_is_no_tensor():
    linear = torch.nn.Linear(2, 3)
    assert str(checks.no_tensor("ref_weight", linear)) == (
        "ref_weight must be a torch.Tensor, got Linear; pass its .weight"
    )
    assert str(checks.no_tensor("bias", linear)).endswith("pass its .bias")
    assert str(checks.no_tensor("mask", [1], "use torch.tensor()")) == (
        "mask must be a torch.Tensor, got list; use torch.tensor()"
    )


def test_numbers_of_numpy_are_as_exact_as_python():
    logps = -torch.rand(4, 3, dtype=torch.float64)
    beta = np.float32(0.3)
    got = objectives.npo(*logps[:2], beta=beta).losses
    assert torch.equal(got, objectives.npo(*logps[:2], beta=float(beta)).losses)
    assert objectives.get("npo", beta=beta) == objectives.get("npo", beta=float(beta))
    mixed = [objectives.combine(["dpo", "hinge"], [one, 1]) for one in (beta, float(beta))]
    assert mixed[0] == mixed[1]
    assert torch.equal(mixed[0](*logps).losses, mixed[1](*logps).losses)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sigmoid", "dpo"),  # TRL's names of losses
        ("robust", "robust_dpo"),
        ("kto_pair", "kto"),
        ("aot_pair", "aot"),
        ("DPO", "dpo"),
        ("SimPO", "simpo"),
        ("alphapo", "alpha_po"),
        ("r-dpo", "r_dpo"),
        ("Sigmoid", "dpo"),
        ("plackett_luse", "plackett_luce"),
    ],
)
def test_names_from_elsewhere(name, meant):
    with pytest.raises(ValueError, match=rf"no objective is called '{name}'; perhaps {meant}\?"):
        objectives.get(name)
    with pytest.raises(ValueError, match=rf"perhaps {meant}\?"):
        objectives.as_objective(name, beta=0.1)


MISTAKES = {
    "a misspelt hyperparameter": ("dpo", {"betta": 0.1}, r"has no .* betta; .*mean 'beta'\?"),
    "an extra": (
        "madpo",
        {"reward_margin": 0.1},
        r"madpo has no hyperparameter reward_margin; it has: beta, .*; reward_margin is an extra: "
        r"preference_loss\(\.\.\., extras={'reward_margin': \.\.\.}\)",
    ),
    "a misspelt extra": (
        "madpo",
        {"reward_margins": 0},
        r"did you mean reward_margin\? It is",
    ),
    "old log-probs": ("grpo", {"old_logps": 0}, r"did you mean old_token_logp\? It is an extra"),
    "a choice": ("ipo", {"normalize": "means"}, r"got 'means'; did you mean 'mean'\?"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_told_of_a_mistake(case):
    name, given, message = MISTAKES[case]
    with pytest.raises((TypeError, ValueError), match=message):
        objectives.get(name, **given)


def test_units_and_scopes():
    with pytest.raises(ValueError, match=r"got 'pairs'; did you mean 'pair'\?"):
        objectives.Objective(lambda a, b: a - b, unit="pairs", scope="pair")
    with pytest.raises(ValueError, match=r"got 'Batch'; did you mean 'batch'\?"):
        objectives.Objective(lambda a, b: a - b, unit="pair", scope="Batch")
