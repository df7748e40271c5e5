# SPDX-License-Identifier: Apache-2.0
"""The compiled operators between products: logits of targets, settled scores, scaled rows."""

import pytest
import torch

from tests.scoring.cases import BACKENDS, DTYPES
from tests.scoring.operator_calls import exact_of
from tests.scoring.settling import MAPS, check_settle, check_settle_alone, check_target_logits

if "cpp" in BACKENDS:
    from fastpref.scoring.backends import cpp

pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
ops = torch.ops.fastpref
maps = pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@maps
@pytest.mark.parametrize("biased", [False, True])
def test_target_logits(dtype, map, biased):
    check_target_logits(cpp.target_logits, dtype, map, biased)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [0, 1, 7, 1025])
def test_target_logits_of_any_width(dtype, width):
    hidden = torch.randn(20, width + 3).to(dtype)[:, 2 : 2 + width]
    weight = torch.randn(50, width + 9).to(dtype)[:, 5 : 5 + width]
    target = torch.randint(0, 50, (20,))
    _, raw, logit = ops.target_logits(hidden, weight, target, None, 1.0, 0.0)
    expected = (hidden.double() * weight.double()[target]).sum(1)
    torch.testing.assert_close(raw.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(raw, logit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@maps
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_settle(dtype, map, statistics, offset):
    check_settle(cpp.settle, dtype, map, statistics, offset)


def test_settle_alone():
    check_settle_alone(cpp.settle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [0, 1, 7, 1025])
def test_scale_rows(dtype, width):
    """Rounded once, in place or not, and nothing beside the rows is touched."""
    wide = torch.randn(20, width + 9).to(dtype)
    rows = wide[:, 5 : 5 + width]
    factor = torch.randn(20).to(exact_of(dtype))
    expected = (rows.to(exact_of(dtype)) * factor[:, None]).to(dtype)
    out = torch.empty(20, width, dtype=dtype)
    ops.scale_rows_(out, rows, factor)
    assert torch.equal(out, expected)
    beside = wide[:, :5].clone(), wide[:, 5 + width :].clone()
    ops.scale_rows_(rows, rows, factor)
    assert torch.equal(rows, expected)
    assert torch.equal(wide[:, :5], beside[0]) and torch.equal(wide[:, 5 + width :], beside[1])
