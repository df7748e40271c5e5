# SPDX-License-Identifier: Apache-2.0
"""The compiled operators on vectors of rows: their gradient's factors, and places."""

import pytest
import torch

from fastpref.scoring.backends import torch as torch_backend
from tests.scoring.cases import BACKENDS
from tests.scoring.operator_calls import EXACT, INF, patterns, places_of, same_bits

pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
ops = torch.ops.fastpref


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("rate", [1.0, 0.7, -3.0, 0.0, 1e-40, 1e30])
def test_gradient_factors(dtype, rate):
    """Those of plain torch to the last bit, and 0 where no gradient arrives, whatever the row
    holds."""
    gradient, scale = torch.randn(2, 300, dtype=dtype)
    gradient[::3] = torch.tensor([0.0, -0.0], dtype=dtype).repeat(50)
    special = torch.tensor([torch.nan, INF, -INF, 0.0, -0.0, 1e-38, 3e38], dtype=dtype)
    scale[:7] = special
    gradient[100:107], gradient[200:207] = special, special.flip(0)
    found, active = ops.gradient_factors(gradient, scale, rate, None)
    same_bits(found, torch_backend.gradient_factors(gradient, scale, rate))
    assert (found[gradient == 0] == 0).all()
    assert active == int((gradient != 0).sum())
    places = places_of(300, 40)
    some, active = ops.gradient_factors(gradient, scale[places], rate, places)
    same_bits(some, found[places])
    assert active == int((gradient[places] != 0).sum())
    none, active = ops.gradient_factors(gradient[:0], scale[:0], rate, None)
    assert none.shape == (0,) and active == 0


@pytest.mark.parametrize("which", patterns(1))
@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_places(which, rows):
    """They are left out where every row is one."""
    there = patterns(rows)[which]
    expected = there.nonzero()[:, 0]
    calls = [(ops.nonzero_places, there.to(dtype), ()) for dtype in EXACT]
    for index in (-100, 0, 7, 2**62, -(2**63)):
        other = torch.where(torch.rand(rows) < 0.5, index + 1, 3)
        calls.append((ops.scored_places, torch.where(there, other, index), (index,)))
    for operator, values, rest in calls:
        before = values.clone()
        places, count = operator(values, *rest)
        assert count == len(expected)
        assert places.dtype == torch.int64
        assert torch.equal(places, expected if count < rows else expected[:0])
        assert torch.equal(values, before)


@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (0, 4)])
def test_targets_of_any_shape_are_those_of_their_rows(shape):
    """Those of a batch need no view."""
    target = torch.randint(0, 3, shape)
    places, count = ops.scored_places(target, 1)
    expected = (target.flatten() != 1).nonzero()[:, 0]
    assert count == len(expected)
    assert torch.equal(places, expected if count < target.numel() else expected[:0])
    rows, cols = target.numel(), 5
    tile, weight = torch.randn(rows, cols), torch.randn(cols, 2)
    hidden = torch.randn(rows, 2)
    given = hidden, weight, target, None, 1.0, 0.0, False, True
    flat = hidden, weight, target.flatten(), None, 1.0, 0.0, False, True
    for found, want in zip(
        ops.score_rows_(tile, *given), ops.score_rows_(tile, *flat), strict=True
    ):
        same_bits(found, want)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_what_counts_as_a_gradient(dtype):
    """All that is not equal to 0: the smallest number and NaN, but no zero of either sign."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = [torch.nan, 0.0, -0.0, INF, -INF, smallest, -smallest, -0.0, 1.0]
    places, count = ops.nonzero_places(torch.tensor(values, dtype=dtype))
    assert places.tolist() == [0, 3, 4, 5, 6, 8] and count == 6
