# SPDX-License-Identifier: Apache-2.0
"""The mean logits of the modules: over all positions as Liger-Kernel has them, without the
logits."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastpref import nn
from fastpref.nn import mean_logits
from fastpref.nn.mean_logits import sums_of_mean_logits
from tests.nn.peers import B, compare, gradients, leaves, tensors

GIVEN = ("_input", "lin_weight", "target", "bias")
LABELS = torch.tensor([True, False, True, True, False, True])
PLACES = (2, 3)
MODULES = {
    "dpo": nn.FusedLinearDPOLoss(use_ref_model=False),
    "dpo with likelihood": nn.FusedLinearDPOLoss(use_ref_model=False, compute_nll_loss=True),
    "cpo": nn.FusedLinearCPOLoss(),
    "simpo": nn.FusedLinearSimPOLoss(),
    "orpo": nn.FusedLinearORPOLoss(),
    "kto": nn.FusedLinearKTOLoss(),
}


def batch(name, dtype=torch.float64, **how):
    every = tensors(dtype, **how)
    given = {one: every[one] for one in GIVEN}
    return given | {"preference_labels": LABELS} if name == "kto" else given


def by_hand(name, given):
    logits = given["_input"].double() @ given["lin_weight"].double().t() + given["bias"].double()
    if name == "kto":
        return logits[LABELS].sum(), logits[~LABELS].sum()
    return logits[: B // 2].mean(), logits[B // 2 :].mean()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_over_all_positions(name, dtype):
    given = batch(name, dtype)
    _, returned = MODULES[name](**given)
    for place, want in zip(PLACES, by_hand(name, given), strict=True):
        assert returned[place].dim() == 0 and not returned[place].requires_grad
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            returned[place].double(), want, rtol=tolerance, atol=tolerance * want.abs().item()
        )


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_in_half_precision_as_liger(name):
    """To the rounding of Liger-Kernel, which adds bfloat16 logits up in bfloat16."""
    given = batch(name.lower(), torch.bfloat16)
    settings = {"use_ref_model": False, "compiled": False}
    theirs = pytest.importorskip("liger_kernel.chunked_loss")
    _, want = getattr(theirs, f"LigerFusedLinear{name}Loss")(**settings)(**given)
    _, got = getattr(nn, f"FusedLinear{name}Loss")(**settings)(**given)
    for place in PLACES:
        torch.testing.assert_close(got[place], want[place].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_not_scored_reaches_them_alone(name):
    given = batch(name)
    spoilt = given | {"_input": given["_input"].clone()}
    spoilt["_input"][given["target"] == -100] = torch.nan
    found = []
    for one in (given, spoilt):
        one = leaves(one)
        loss, returned = MODULES[name](**one)
        found.append((loss, *returned, *gradients(loss, one)))
    for place, (got, want) in enumerate(zip(*found[::-1], strict=True)):
        if place - 1 in PLACES:
            assert got.isnan() and want.isfinite()
        else:
            assert torch.equal(got, want)


def test_no_product(monkeypatch):
    """Nor a wider copy of the head."""
    monkeypatch.setattr(mean_logits, "BLOCK", 50)
    given = tensors(torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        got = sums_of_mean_logits(given["_input"], given["lin_weight"], None)
    assert counter.get_total_flops() == 0
    logits = given["_input"].double() @ given["lin_weight"].double().t()
    torch.testing.assert_close(got.double(), logits.mean(-1).sum(-1), rtol=1e-5, atol=1e-5)


def test_under_autocast():
    given = tensors(torch.float32)
    arguments = given["_input"], given["lin_weight"], given["bias"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sums_of_mean_logits(*arguments)
    assert torch.equal(got, sums_of_mean_logits(*arguments))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "kto"])
def test_where_no_response_is_compared(name):
    given = {
        one: value[:0] if one in ("_input", "target") else value
        for one, value in batch(name).items()
    }
    _, returned = MODULES[name](**given)
    assert all(returned[place] == 0 for place in PLACES)


def test_where_all_is_scored():
    compare("FusedLinearDPOLoss", tensors(masked=False), {"beta": 0.3})
