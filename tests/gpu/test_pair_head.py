# SPDX-License-Identifier: Apache-2.0
"""The pair head on a GPU against the objective in float64."""

import pytest
import torch

from fastpref._extension import cuda_ops_unavailable_reason
from fastpref.objectives import Objective
from fastpref.units import pair_head
from tests.units.test_pair_head import FAMILY, IDS, differentiable, make_pairs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pairs", [1, 700, 5000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("objective", FAMILY, ids=IDS)
def test_pair_head(objective: Objective, dtype: torch.dtype, pairs: int) -> None:
    logps, extras = make_pairs(objective, pairs)
    there = [None if one is None else one.detach().to("cuda", dtype) for one in logps]
    inputs = [one.requires_grad_() for one in there if one is not None]
    counts = {name: one.cuda() for name, one in extras.items()}
    upstream = torch.randn(pairs, dtype=torch.float64)
    here = upstream.to("cuda", dtype)
    result = pair_head.pair_head(objective, *there, **counts)
    if cuda_ops_unavailable_reason() is None:
        assert type(result.losses.grad_fn).__name__ == "_PairHeadBackward"
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = pair_head.pair_head(objective, *there, **counts)
        gradients = torch.autograd.grad(again.losses, inputs, here)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = objective(*logps, **extras)
    wanted = torch.autograd.grad(expected.losses, differentiable(logps), upstream)
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    close = {"rtol": rtol, "atol": rtol}
    for got, want in zip((*again[:3], *gradients), (*expected, *wanted), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, **close)
    assert torch.equal(again.losses, result.losses)
    for name, value in again.metrics.items():
        assert torch.equal(value, result.metrics[name])
