# SPDX-License-Identifier: Apache-2.0
"""The JSD module against Liger-Kernel's, and against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from fastpref.nn import FusedLinearJSDLoss
from tests.nn.distilled import (
    N,
    V,
    batch,
    check_common_vocabulary,
    compare,
    gradients,
    leaves,
    plain_logits,
)
from tests.nn.peers import IGNORE, assert_same_signatures, close

NAME = "FusedLinearJSDLoss"


def test_signatures():
    assert_same_signatures(NAME)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.0},
        {"beta": 1.0},
        {"beta": 0.2, "temperature": 2.0},
        {"weight_hard_loss": 0.9, "weight_soft_loss": 0.3},
        {"weight_hard_loss": 0.0},
        {"ignore_index": 7},
    ],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_as_liger(settings, bias):
    given = batch(bias=bias)
    if "ignore_index" in settings:
        given["true_labels"] = torch.where(given["true_labels"] == IGNORE, 7, given["true_labels"])
    compare(NAME, given, settings)


@pytest.mark.parametrize("more", [-4, 4])
def test_vocabularies_padded_differently(more):
    check_common_vocabulary(FusedLinearJSDLoss, more)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_as_plain_torch(beta):
    given = leaves(batch())
    module = FusedLinearJSDLoss(beta=beta, temperature=1.5, return_soft_hard_loss=True)
    loss, soft, hard = module(**given)
    student, teacher = plain_logits(given, "student"), plain_logits(given, "teacher")
    p, q = (student / 1.5).softmax(-1), (teacher / 1.5).softmax(-1)
    m = beta * q + (1 - beta) * p

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    values = beta * kl(q, m) + (1 - beta) * kl(p, m)
    values = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta, values)
    scored = given["true_labels"] != IGNORE
    expected_soft = values[scored].mean()
    expected_hard = F.cross_entropy(student[scored], given["true_labels"][scored])
    expected = 0.5 * (expected_soft + expected_hard)
    close((loss, soft, hard), (expected, expected_soft, expected_hard), 1e-9)
    got = gradients(loss + 3 * soft + 5 * hard, given)
    close(got, gradients(expected + 3 * expected_soft + 5 * expected_hard, given), 1e-8)


def test_nothing_scored_is_zero():
    given = leaves(batch() | {"true_labels": torch.full((N,), IGNORE)})
    loss, *parts = FusedLinearJSDLoss(return_soft_hard_loss=True)(**given)
    assert loss == 0 and all(part == 0 for part in parts)
    assert all((one == 0).all() for one in gradients(loss, given))


def test_one_number_by_default():
    given = batch()
    loss = FusedLinearJSDLoss()(**given)
    assert torch.equal(loss, FusedLinearJSDLoss(return_soft_hard_loss=True)(**given)[0])


def test_what_is_not_scored_is_not_read():
    given = batch()
    expected = FusedLinearJSDLoss()(**given)
    for name in ("student_input", "teacher_input"):
        given[name][given["true_labels"] == IGNORE] = torch.nan
    assert torch.equal(FusedLinearJSDLoss()(**given), expected)


CASES = {
    "no temperature": ({"temperature": 0.0}, {}, "temperature must be > 0, got 0.0"),
    "beta": ({"beta": 1.5}, {}, r"beta must be in \[0, 1\], .* got 1.5"),
    "labels": (
        {},
        {"true_labels": torch.zeros(3, dtype=torch.long)},
        r"student_input must be \(..., H\) and true_labels \(...\), got \(11, 8\) and \(3,\)",
    ),
    "weight": (
        {},
        {"teacher_weight": torch.zeros(V, 3).double()},
        r"teacher_weight must be \(V, H\) with H = 11 of teacher_input, got \(23, 3\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    settings, changes, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        FusedLinearJSDLoss(**settings)(**batch() | changes)
