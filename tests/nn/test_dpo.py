# SPDX-License-Identifier: Apache-2.0
"""The DPO module against Liger-Kernel's, and against plain torch where that is wrong."""

import pytest
import torch

from fastpref import objectives
from fastpref.nn import FusedLinearDPOLoss
from fastpref.nn.dpo import LOSS_TYPES
from tests.nn.peers import (
    B,
    H,
    T,
    assert_same_signatures,
    close,
    compare,
    gradients,
    leaves,
    tensors,
    token_logps,
)

SHARED = {
    "sigmoid": {},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.02},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {"beta": 0.5},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.3},
}


def test_signatures():
    assert_same_signatures("FusedLinearDPOLoss")


@pytest.mark.parametrize("loss_type", SHARED)
@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
def test_every_loss_type(loss_type, average):
    settings = {"loss_type": loss_type, "average_log_prob": average} | SHARED[loss_type]
    compare("FusedLinearDPOLoss", tensors(), settings)


@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
@pytest.mark.parametrize("use_ref_model", [False, True], ids=["uniform", "reference"])
def test_with_the_likelihood_term(average, use_ref_model):
    settings = {"compute_nll_loss": True, "alpha": 0.4, "average_log_prob": average}
    given = tensors() if use_ref_model else {k: v for k, v in tensors().items() if "ref" not in k}
    settings["use_ref_model"] = use_ref_model
    compare("FusedLinearDPOLoss", given, settings)


def test_float32_without_bias():
    given = tensors(torch.float32) | {"bias": None, "ref_bias": None}
    loss, _ = compare("FusedLinearDPOLoss", given, {})
    assert loss.dtype == torch.float32


def by_hand(given, average=False):
    """Sums or means of policy and reference, (B,) each."""
    scored = (given["target"] != -100).sum(-1).clamp(min=1) if average else 1
    policy, _ = token_logps(given, given["target"])
    ref, _ = token_logps(given, given["target"], "ref_")
    return policy.sum(-1) / scored, ref.sum(-1) / scored


@pytest.mark.parametrize("loss_type", [one for one in LOSS_TYPES if one not in SHARED])
def test_further_loss_types(loss_type):
    given = leaves(tensors())
    policy, ref = by_hand(given)
    extras = {}
    if loss_type in ("ipo", "sigmoid_norm"):
        lengths = (given["target"] != -100).sum(-1)
        extras = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
    function = getattr(objectives, LOSS_TYPES[loss_type])
    expected = function(*policy.chunk(2), *ref.chunk(2), beta=0.3, **extras).losses.mean()
    loss, _ = FusedLinearDPOLoss(loss_type=loss_type, beta=0.3)(**given)
    close((loss, gradients(loss, given)), (expected, gradients(expected, given)), 1e-9)


def test_label_smoothing_of_sigmoid_counts():
    given = leaves(tensors())
    policy, ref = by_hand(given)
    margins = 0.3 * torch.sub(*(policy - ref).chunk(2))
    logs = torch.nn.functional.logsigmoid
    expected = -(0.8 * logs(margins) + 0.2 * logs(-margins)).mean()
    loss, _ = FusedLinearDPOLoss(beta=0.3, label_smoothing=0.2)(**given)
    close((loss, gradients(loss, given)), (expected, gradients(expected, given)), 1e-9)


@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
def test_returned_log_probs_carry_gradients(average):
    given = leaves(tensors())
    module = FusedLinearDPOLoss(compute_nll_loss=True, average_log_prob=average)
    loss, (chosen, rejected, _, _, nll, *_) = module(**given)
    policy, _ = by_hand(given, average)
    expected_nll = -by_hand(given)[0][: B // 2].sum() / (given["target"][: B // 2] != -100).sum()
    weights = torch.arange(1.0, B + 1).double()
    got = (torch.cat([chosen, rejected]) * weights).sum() + 3 * nll
    want = (policy * weights).sum() + 3 * expected_nll
    close((got, gradients(got, given)), (want, gradients(want, given)), 1e-9)
    assert loss.requires_grad


@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
def test_rows_without_scored_tokens_are_zero(average):
    given = tensors()
    given["target"][: B // 2] = -100
    given["target"][B - 1] = -100
    given = leaves(given)
    module = FusedLinearDPOLoss(compute_nll_loss=True, average_log_prob=average)
    loss, returned = module(**given)
    assert (returned[0] == 0).all() and returned[1][-1] == 0 and returned[4] == 0
    assert torch.isfinite(loss) and all(torch.isfinite(one).all() for one in returned)
    assert all(torch.isfinite(one).all() for one in gradients(loss, given))


def test_what_is_not_scored_is_not_read():
    given = tensors()
    expected, _ = FusedLinearDPOLoss()(**given)
    for name in ("_input", "ref_input"):
        given[name][given["target"] == -100] = torch.nan
    assert torch.equal(FusedLinearDPOLoss()(**given)[0], expected)


def test_another_ignore_index_and_the_policys_head():
    given = tensors()
    expected, _ = FusedLinearDPOLoss()(**given)
    target = torch.where(given["target"] == -100, 7000, given["target"])
    close(FusedLinearDPOLoss(ignore_index=7000)(**given | {"target": target})[0], expected)
    shared = given | {"ref_input": given["_input"], "ref_weight": None, "ref_bias": None}
    close(FusedLinearDPOLoss()(**shared)[0], torch.tensor(2.0).log())


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.7},
        {"loss_type": "ipo"},
        {"average_log_prob": True, "label_smoothing": 0.2},
        {"compute_nll_loss": True, "alpha": 0.3},
    ],
)
def test_settings_may_change_later(settings):
    module = FusedLinearDPOLoss()
    for name, value in settings.items():
        setattr(module, name, value)
    given = tensors()
    assert torch.equal(module(**given)[0], FusedLinearDPOLoss(**settings)(**given)[0])
    module.beta = -1.0
    with pytest.raises(ValueError, match=r"beta must be > 0, got -1\.0"):
        module(**given)


CASES = {
    "unknown loss": (
        {"loss_type": "dpo"},
        {},
        "Unsupported loss_type: loss_type must be one of .* got 'dpo'; did you mean 'sigmoid'",
    ),
    "smoothing of none": (
        {"loss_type": "hinge", "label_smoothing": 0.1},
        {},
        "label_smoothing is no part of loss_type='hinge', got 0.1; leave it 0",
    ),
    "too much smoothing": (
        {"loss_type": "robust", "label_smoothing": 0.5},
        {},
        r"label_smoothing must lie in \[0\.0, 0\.5\) for loss_type='robust': .* got 0.5",
    ),
    "exo without smoothing": (
        {"loss_type": "exo_pair"},
        {},
        r"label_smoothing must be > 0 for loss_type='exo_pair': .* in \(0, 0.5\).* got 0.0",
    ),
    "no reference": ({}, {"ref_input": None}, "pass ref_input, got None, or construct"),
    "odd rows": (
        {},
        {"_input": torch.zeros(3, T, H), "target": torch.zeros(3, T, dtype=torch.long)},
        "an even number, got 3; drop",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    settings, changes, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss(**settings)(**tensors() | changes)
