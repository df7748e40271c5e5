# SPDX-License-Identifier: Apache-2.0
"""The KTO module against Liger-Kernel's, and against plain torch where that is wrong."""

import pytest
import torch

from fastpref.nn import FusedLinearKTOLoss
from tests.nn.peers import (
    B,
    assert_same_signatures,
    close,
    compare,
    gradients,
    leaves,
    tensors,
    token_logps,
)

NAME = "FusedLinearKTOLoss"
LABELS = torch.tensor([True, False, True, True, False, True])
KL = torch.tensor(0.4, dtype=torch.float64)


def batch(reference=True, **how):
    every = tensors(**how) | {"preference_labels": LABELS, "kl": KL}
    return {name: one for name, one in every.items() if reference or "ref_" not in name}


def test_signatures():
    assert_same_signatures(NAME)


@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
@pytest.mark.parametrize("reference", [False, True], ids=["uniform", "reference"])
@pytest.mark.parametrize("kl", [None, KL])
def test_as_liger(kl, reference, average):
    given = batch(reference) | {"kl": kl}
    settings = {"use_ref_model": reference, "average_log_prob": average, "beta": 0.3}
    compare(NAME, given, settings)


def test_one_label_only():
    compare(NAME, batch() | {"preference_labels": torch.ones(B, dtype=torch.bool)}, {})


def test_labels_may_be_numbers_and_kl_a_batch_of_one():
    given = batch(reference=False)
    changed = given | {"preference_labels": LABELS.long(), "kl": KL.reshape(1)}
    for got, want in zip(
        FusedLinearKTOLoss()(**changed)[1], FusedLinearKTOLoss()(**given)[1], strict=True
    ):
        assert torch.equal(got, want)


def test_returned_log_probs_carry_gradients():
    given = leaves(batch())
    _, (desirable, undesirable, *_) = FusedLinearKTOLoss()(**given)
    logps = token_logps(given, given["target"])[0].sum(-1)
    want = logps[LABELS].sum() + 3 * logps[~LABELS].sum()
    got = desirable + 3 * undesirable
    close((got, gradients(got, given)), (want, gradients(want, given)), 1e-9)


def test_rows_without_scored_tokens_are_zero():
    given = batch()
    given["target"][LABELS] = -100
    given = leaves(given)
    loss, returned = FusedLinearKTOLoss(use_ref_model=True, average_log_prob=True)(**given)
    assert returned[0] == 0 and returned[4] == 0
    assert torch.isfinite(loss) and all(torch.isfinite(one).all() for one in returned)
    assert all(torch.isfinite(one).all() for one in gradients(loss, given))


def test_the_policys_head_serves_the_reference():
    given = batch()
    changes = {"ref_input": given["_input"], "ref_weight": None, "ref_bias": None}
    _, returned = FusedLinearKTOLoss(use_ref_model=True)(**given | changes)
    assert returned[4] == 0 and returned[5] == 0


CASES = {
    "no labels": (
        {"preference_labels": None},
        "preference_labels must be provided for unpaired preference loss: .* got None",
    ),
    "labels of another shape": (
        {"preference_labels": LABELS[:3]},
        r"preference_labels must be \(6,\), got \(3,\)",
    ),
    "labels that are none": ({"preference_labels": LABELS.long() - 1}, "labels must be 0 or 1"),
    "several kl": ({"kl": torch.zeros(B)}, r"kl must be a tensor of one number.* got \(6,\)"),
    "no reference": ({"ref_input": None}, "pass ref_input, got None"),
    "reference of another width": (
        {"ref_weight": torch.zeros(23, 3)},
        r"ref_weight must be \(V, H\) with H = 10 of ref_input, got \(23, 3\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    changes, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        FusedLinearKTOLoss(use_ref_model=True)(**batch() | changes)


def test_beta_is_checked_when_constructed():
    with pytest.raises(ValueError, match="kto: beta must be > 0, got 0"):
        FusedLinearKTOLoss(beta=0)
