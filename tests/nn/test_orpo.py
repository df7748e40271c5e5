# SPDX-License-Identifier: Apache-2.0
"""The ORPO module against Liger-Kernel's, and where the policy is certain."""

import pytest
import torch

from fastpref.nn import FusedLinearORPOLoss, paired
from tests.nn.peers import B, T, V, assert_same_signatures, compare, gradients, leaves, tensors

NAME = "FusedLinearORPOLoss"
GIVEN = ("_input", "lin_weight", "target", "bias")


def batch(**how):
    every = tensors(**how)
    return {name: every[name] for name in GIVEN}


def nll_targets(target):
    """Of prompt and response; of one response otherwise; of half a response."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(V, (B, T), generator=generator)
    both = torch.where(target == -100, tokens, target)
    both[0, 0] = -100  # padding
    other = both.clone()
    other[1] = tokens[1]
    half = both.clone()
    half[2, 3:] = -100
    return {"both": both, "other": other, "half": half, "none": torch.full_like(target, -100)}


def test_signatures():
    assert_same_signatures(NAME)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.7}, {"compute_nll_loss": False}])
def test_as_liger(settings):
    compare(NAME, batch(), settings)


@pytest.mark.parametrize("which", ["both", "other", "half"])
@pytest.mark.parametrize("settings", [{"beta": 0.7}, {"compute_nll_loss": False}])
def test_another_target_of_the_likelihood(which, settings):
    given = batch()
    given["target"][0, 0] = -100
    given["nll_target"] = nll_targets(given["target"])[which]
    compare(NAME, given, settings)


def test_tokens_in_both_targets_are_scored_once(monkeypatch):
    scored = []
    whole = paired.preference_loss

    def counting(hidden, weight, target, *args, **keywords):
        scored.append(target != -100)
        return whole(hidden, weight, target, *args, **keywords)

    monkeypatch.setattr(paired, "preference_loss", counting)
    given = batch()
    given["target"][0, 0] = -100
    nll_target = nll_targets(given["target"])["both"]
    FusedLinearORPOLoss()(**given, nll_target=nll_target)
    either = torch.cat([nll_target[:3], given["target"][3:]]) != -100
    assert len(scored) == 1 and scored[0].sum() == either.sum()


@pytest.mark.parametrize("which", ["none", "absent"])
def test_rows_without_scored_tokens(which):
    given = batch()
    given["target"][:3] = -100
    given["target"][4] = -100
    if which == "none":
        given["nll_target"] = torch.full_like(given["target"], -100)
    given = leaves(given)
    loss, returned = FusedLinearORPOLoss()(**given)
    assert torch.isfinite(loss) and all(torch.isfinite(one).all() for one in returned)
    assert all(torch.isfinite(one).all() for one in gradients(loss, given))
    assert returned[4] == 0


def test_a_certain_policy_stays_finite():
    given = batch()
    given["bias"] = torch.zeros(V).double()
    given["bias"][2] = 1e3
    given["target"] = torch.where(given["target"] == -100, -100, 2)
    given = leaves(given)
    loss, returned = FusedLinearORPOLoss()(**given)
    assert torch.isfinite(loss) and all(torch.isfinite(one).all() for one in returned)
    assert all(torch.isfinite(one).all() for one in gradients(loss, given))


def test_errors():
    given = batch()
    with pytest.raises(ValueError, match=r"nll_target must be \(6, 5\), got \(3, 5\)"):
        FusedLinearORPOLoss()(**given, nll_target=given["target"][:3])
    with pytest.raises(ValueError, match="orpo: beta must be > 0, got -1"):
        FusedLinearORPOLoss(beta=-1)
