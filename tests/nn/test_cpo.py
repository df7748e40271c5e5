# SPDX-License-Identifier: Apache-2.0
"""The CPO module against Liger-Kernel's."""

import pytest
import torch

from fastpref.nn import FusedLinearCPOLoss
from tests.nn.peers import assert_same_signatures, compare, tensors

NAME = "FusedLinearCPOLoss"
GIVEN = ("_input", "lin_weight", "target", "bias")


def batch(**how):
    every = tensors(**how)
    return {name: every[name] for name in GIVEN}


def test_signatures():
    assert_same_signatures(NAME)


@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.7, "alpha": 0.3},
        {"label_smoothing": 0.2},
        {"compute_nll_loss": False, "alpha": 2.0},
    ],
)
def test_as_liger(settings, average):
    compare(NAME, batch(), settings | {"average_log_prob": average})


def test_a_batch_without_chosen_tokens_has_no_likelihood():
    given = batch()
    given["target"][:3] = -100
    loss, returned = FusedLinearCPOLoss()(**given)
    assert torch.isfinite(loss) and returned[4] == 0


def test_errors():
    with pytest.raises(ValueError, match="cpo: beta must be > 0, got 0"):
        FusedLinearCPOLoss(beta=0)
    given = batch()
    with pytest.raises(ValueError, match="mind the order of the arguments"):
        FusedLinearCPOLoss()(given["_input"], given["lin_weight"], given["target"])
