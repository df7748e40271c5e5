# SPDX-License-Identifier: Apache-2.0
"""The SimPO module against Liger-Kernel's."""

import pytest
import torch

from fastpref.nn import FusedLinearSimPOLoss
from tests.nn.peers import assert_same_signatures, close, compare, leaves, tensors

NAME = "FusedLinearSimPOLoss"
GIVEN = ("_input", "lin_weight", "target", "bias")


def batch(**how):
    every = tensors(**how)
    return {name: every[name] for name in GIVEN}


def test_signatures():
    assert_same_signatures(NAME)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 2.0, "gamma": 1.2},
        {"label_smoothing": 0.2},
        {"compute_nll_loss": False},
        {"alpha": 0.3},
    ],
)
def test_as_liger(settings):
    compare(NAME, batch(), settings)


def test_a_row_without_scored_tokens_has_mean_zero():
    given = batch()
    given["target"][1] = -100
    given = leaves(given)
    loss, returned = FusedLinearSimPOLoss(beta=2.0)(**given)
    assert torch.isfinite(loss) and returned[0][1] == 0
    margin = 2.0 * (returned[0] - returned[1]) - 0.5
    close(loss - returned[4], -torch.nn.functional.logsigmoid(margin).mean(), 1e-9)


def test_errors():
    with pytest.raises(ValueError, match=r"simpo: label_smoothing must be in \[0, 0.5\)"):
        FusedLinearSimPOLoss(label_smoothing=0.5)
