# SPDX-License-Identifier: Apache-2.0
"""The compiled operators on vectors of rows: their gradient's factors, places, and what becomes
of rows by them."""

import pytest
import torch

from fastpref.scoring.backends import torch as torch_backend
from tests.scoring.cases import BACKENDS, DTYPES
from tests.scoring.operator_calls import (
    EXACT,
    INF,
    gradient_rows_arguments,
    patterns,
    same_bits,
    spread_rows_arguments,
)

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
    found = ops.gradient_factors(gradient, scale, rate)
    same_bits(found, torch_backend.gradient_factors(gradient, scale, rate))
    assert (found[gradient == 0] == 0).all()
    assert ops.gradient_factors(gradient[:0], scale[:0], rate).shape == (0,)


LAID = {
    "one after the other": lambda gradient: gradient,
    "of a sum": lambda gradient: gradient[:1, :1, :1].expand(gradient.shape),
    "of sums of rows": lambda gradient: gradient[:, :, :1].expand(gradient.shape),
    "turned": lambda gradient: gradient.transpose(0, 2).contiguous().transpose(0, 2),
    "every other": lambda gradient: gradient.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("count", [0, 1, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_under_a_gradient(dtype, count, laid):
    """Factors as of the operator above and rows as of scale_rows_, to the last bit, whether rows
    are the batch's or those at places, and however the gradient lies."""
    given = gradient_rows_arguments(dtype, 300, count, 6)
    gradient, rows, places = given["gradient"], given["rows"], given["places"]
    gradient[5] = torch.nan
    gradient = LAID[laid](gradient.view(5, 6, 10))
    chosen = torch.arange(300) if places is None else places
    own, scale = gradient.reshape(-1)[chosen], given["numbers"][-1].contiguous()
    want = ops.gradient_factors(own, scale, 0.7)
    scaled = torch.empty(count, 6, dtype=dtype)
    ops.scale_rows_(scaled, rows[chosen], want)
    for shaped in (rows, rows.view(5, 60, 6), rows[chosen]):
        before = shaped.clone()
        found = ops.gradient_rows(**{**given, "gradient": gradient, "rows": shaped})
        same_bits(found[0], want)
        same_bits(found[1], scaled)
        assert found[2] == count
        assert torch.equal(shaped, before)


@pytest.mark.parametrize("count", [40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_gradient_leave_all_to_the_caller(dtype, count):
    given = gradient_rows_arguments(dtype, 300, count, 6)
    gradient, places = given["gradient"], given["places"]
    gradient[::3] = torch.tensor([0.0, -0.0], dtype=gradient.dtype).repeat(50)
    own = gradient if places is None else gradient[places]
    factor, scaled, active = ops.gradient_rows(**given)
    same_bits(factor, ops.gradient_factors(own, given["numbers"][-1].contiguous(), 0.7))
    assert scaled.shape == (0, 6) and scaled.dtype == dtype
    assert active == int((own != 0).sum()) < count


@pytest.mark.parametrize("count", [0, 1, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_spread(dtype, count):
    given = spread_rows_arguments(dtype, 300, count, 6)
    want = torch.zeros(300, 6, dtype=dtype)
    scaled = torch.empty(count, 6, dtype=dtype)
    ops.scale_rows_(scaled, given["rows"], given["factor"])
    want[given["places"]] = scaled
    out = torch.full((5, 60, 6), torch.nan, dtype=dtype)
    ops.spread_rows_(**{**given, "out": out})
    same_bits(out.view(300, 6), want)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_are_shared_by_threads(threads):
    given = gradient_rows_arguments(total=5000, count=4000, width=64)
    spread, before = torch.empty(5000, 64), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        factor, scaled, _ = ops.gradient_rows(**given)
        ops.spread_rows_(spread, scaled, factor, given["places"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(scaled, factor[:, None] * given["rows"][given["places"]])
    want = torch.zeros(5000, 64).index_copy(0, given["places"], factor[:, None] * scaled)
    assert torch.equal(spread, want)


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
