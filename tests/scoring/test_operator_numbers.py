# SPDX-License-Identifier: Apache-2.0
"""The compiled operators on rows of a tile: conversions, exponentials, sums."""

import math

import pytest
import torch

from fastpref.scoring.statistics import RowSums
from tests.scoring.cases import BACKENDS, DTYPES
from tests.scoring.operator_calls import INF, exact_of, exp_rows_arguments, logit_grad_arguments

pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
ops = torch.ops.fastpref
HALVES = (torch.float16, torch.bfloat16)


def all_bits(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_read_exactly(dtype):
    values = all_bits(dtype)
    call = exp_rows_arguments(
        tile=values.clone()[:, None],
        target=torch.full((65536,), -1),
        anchor=torch.zeros(65536),
        write=False,
    )
    sums = RowSums.of(*ops.exp_rows_(**call))
    expected = values.float()
    numbers = ~expected.isnan()
    assert torch.equal(sums.best[numbers], expected[numbers])
    assert sums.sum[~numbers].isnan().all()


def floats_between(dtype):
    """Every value of ``dtype``, every midpoint of neighbours, and the floats beside both; random
    bits; the extremes."""
    values = all_bits(dtype).float()
    values = values[values.isfinite()].sort().values.unique()
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    points = torch.cat([values, middles])
    beside = [torch.nextafter(points, torch.tensor(limit)) for limit in (INF, -INF)]
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    largest = torch.finfo(torch.float32).max
    extremes = torch.tensor([INF, -INF, float("nan"), largest, -largest, 65504, 65519.99, 65520])
    return torch.cat([points, *beside, bits.view(torch.float32), extremes])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_written_as_torch_rounds(dtype):
    """With logp 0 and no other gradient the target's entry becomes grad_lse, rounded."""
    values = floats_between(dtype)
    # 0 times anything is added before: it loses the sign of zero.
    values = torch.where(values == 0, 0.0, values)
    rows = values.shape[0]
    call = logit_grad_arguments(
        rows,
        1,
        dtype,
        grad_logp=torch.zeros(rows),
        grad_lse=values,
        grad_entropy=None,
        entropy=None,
        bias=None,
    )
    ops.logit_grad_(**call)
    actual, expected = call["tile"][:, 0], values.to(dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize(
    "dtype, lowest, ulps", [(torch.float32, -87.0, 2), (torch.float64, -708.0, 2)]
)
def test_exponentials(dtype, lowest, ulps):
    x = torch.linspace(lowest, 29.9, 100_001, dtype=dtype)
    # Around every multiple of ln 2, where the reduction changes over.
    k = torch.arange(-100, 40, dtype=dtype) * math.log(2) / 2
    x = torch.cat([x, *(torch.nextafter(k, torch.tensor(s, dtype=dtype)) for s in (INF, -INF))])
    x = x[(x > lowest) & (x < 29.9)]
    tile = x[None].clone()
    anchor = torch.zeros(1, dtype=dtype)
    ops.exp_rows_(tile, torch.tensor([-1]), anchor, None, 1.0, 0.0, None, True, False)
    expected = x.double().exp()
    unit = 2.0 ** (expected.frexp().exponent.double() - 1) * torch.finfo(dtype).eps
    assert ((tile[0].double() - expected).abs() <= ulps * unit).all()


def test_exponentials_at_the_ends():
    tile = torch.tensor([[0.0, -INF, -1e30, -87.4, -200.0]])
    ops.exp_rows_(tile, torch.tensor([-1]), torch.zeros(1), None, 1.0, 0.0, None, True, False)
    assert tile.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_what_is_summed(statistics, cap):
    """The sum of the logits under a cap alone."""
    call = exp_rows_arguments(cap=cap, statistics=statistics)
    logits = cap * torch.tanh(call["tile"][:, 1:].double() / cap) if cap else None
    sums = RowSums.of(*ops.exp_rows_(**call))
    assert (sums.best is None) != statistics
    assert (sums.total is None) != (statistics and cap != 0)
    if sums.total is not None:
        torch.testing.assert_close(sums.total.double(), logits.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softcap(dtype):
    """t = cap tanh(scale z / cap), and the exponentials carry 1 - tanh^2."""
    z = torch.cat([torch.linspace(-300, 300, 4001), torch.linspace(-1e-3, 1e-3, 101)]).to(dtype)
    scale, cap = 0.7, 5.0
    tile = z[None].clone()
    sums, _ = ops.exp_rows_(
        tile, torch.tensor([-1]), torch.zeros(1, dtype=dtype), None, scale, cap, None, True, True
    )
    t = cap * torch.tanh(z.double() * scale / cap)
    slope = torch.cosh(z.double() * scale / cap) ** -2
    anchor = sums[0].double()
    expected = (t - anchor).exp() * slope
    # Beyond 40 the slope counts as 0.
    rtol, atol = (1e-4, 2e-32) if dtype == torch.float32 else (1e-12, 0)
    torch.testing.assert_close(tile[0].double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(sums[3].double(), t.max()[None], rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 2, 1023, 1024, 1025, 3001])
@pytest.mark.parametrize("write", [False, True])
def test_sums_do_not_depend_on_where_the_tile_lies(dtype, cols, write):
    """A tile may be a slice of a wider one, and its neighbours are never touched."""
    rows = 5
    wide = torch.randn(rows, cols + 20).to(dtype)
    target = torch.tensor([0, cols - 1, -1, cols, cols // 2])
    anchor = torch.randn(rows).to(exact_of(dtype))
    before = wide.clone()
    alone = wide[:, 7 : 7 + cols].contiguous()
    inside = wide[:, 7 : 7 + cols]
    call = (target, anchor, None, 1.0, 0.0, None, write, True)
    for one, other in zip(ops.exp_rows_(alone, *call), ops.exp_rows_(inside, *call), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(inside, alone)
    assert torch.equal(wide[:, :7], before[:, :7])
    assert torch.equal(wide[:, 7 + cols :], before[:, 7 + cols :])
    if not write:
        assert torch.equal(wide, before)


@pytest.mark.parametrize("rise", [29.0, 31.0, 100.0, 1000.0])
@pytest.mark.parametrize("at", [0, 1, 1023, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_rises_above_its_anchor(dtype, at, rise):
    """One column far above the target, before and after block borders, and the target on either
    side of it."""
    for target in (0, 1022, 1024, 2600):
        if target == at:
            continue
        tile = torch.randn(1, 3001).to(dtype)
        tile[0, at] = rise
        exact = tile.double().clone()
        own = exact[0, target].clone()
        sums, _ = ops.exp_rows_(
            tile,
            torch.tensor([target]),
            own[None].to(exact_of(dtype)),
            None,
            1.0,
            0.0,
            None,
            True,
            False,
        )
        anchor, total, offset = (value.double() for value in sums)
        assert offset == 0
        assert (anchor == own) == (exact.max() - own <= 30)
        exact[0, target] = -INF
        expected = (exact - anchor).exp()
        # t - a is rounded at its own size.
        rtol = max(4e-6, torch.finfo(dtype).eps)
        torch.testing.assert_close(tile.double(), expected, rtol=rtol, atol=1e-37)
        assert tile[0, target] == 0
        torch.testing.assert_close(total, expected.sum()[None], rtol=4e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_tiles(shape):
    rows, cols = shape
    sums, best = ops.exp_rows_(**exp_rows_arguments(rows, cols))
    assert sums.shape == (6, rows) and best.shape == (rows,)
    assert (sums[1] == 0).all()
    ops.logit_grad_(**logit_grad_arguments(rows, cols))
