# SPDX-License-Identifier: Apache-2.0
"""The cosine module against Liger-Kernel's, and against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from fastpref.nn import FusedLinearCosineSimilarityLoss
from tests.nn.distilled import (
    N,
    batch,
    check_common_vocabulary,
    compare,
    gradients,
    leaves,
    plain_logits,
)
from tests.nn.peers import IGNORE, assert_same_signatures, close

NAME = "FusedLinearCosineSimilarityLoss"


def test_signatures():
    assert_same_signatures(NAME)


@pytest.mark.parametrize(
    "settings",
    [{}, {"beta": 2.0}, {"temperature": 2.0}, {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_as_liger(settings, bias):
    compare(NAME, batch(bias=bias), settings)


@pytest.mark.parametrize("more", [-4, 4])
def test_vocabularies_padded_differently(more):
    check_common_vocabulary(FusedLinearCosineSimilarityLoss, more)


def test_as_plain_torch():
    given = leaves(batch())
    module = FusedLinearCosineSimilarityLoss(
        weight_hard_loss=0.2, weight_soft_loss=0.7, beta=1.5, return_soft_hard_loss=True
    )
    loss, soft, hard = module(**given)
    student, teacher = plain_logits(given, "student"), plain_logits(given, "teacher")
    scored = given["true_labels"] != IGNORE
    expected_soft = 1.5 * (1 - F.cosine_similarity(student, teacher, dim=-1))[scored].mean()
    expected_hard = F.cross_entropy(student[scored], given["true_labels"][scored])
    expected = 0.7 * expected_soft + 0.2 * expected_hard
    close((loss, soft, hard), (expected, expected_soft, expected_hard), 1e-9)
    close(gradients(loss, given), gradients(expected, given), 1e-8)


def test_nothing_scored_is_zero():
    given = leaves(batch() | {"true_labels": torch.full((N,), IGNORE)})
    loss = FusedLinearCosineSimilarityLoss()(**given)
    assert loss == 0 and all((one == 0).all() for one in gradients(loss, given))


def test_errors():
    with pytest.raises(ValueError, match="temperature must be > 0, got -1"):
        FusedLinearCosineSimilarityLoss(temperature=-1)
