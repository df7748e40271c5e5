# SPDX-License-Identifier: Apache-2.0
"""The compiled operators by themselves: conversions, exponentials, argument checks, schemas."""

import math

import pytest
import torch

from fastpref.scoring.statistics import RowSums
from tests.scoring.cases import BACKENDS, DTYPES
from tests.scoring.settling import MAPS, check_settle, check_settle_alone, check_target_logits

if "cpp" in BACKENDS:
    from fastpref.scoring.backends import cpp

pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
ops = torch.ops.fastpref
HALVES = (torch.float16, torch.bfloat16)
INF = float("inf")


def exact_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def exp_rows_arguments(rows=3, cols=5, dtype=torch.float32, **changes):
    arguments = {
        "tile": torch.randn(rows, cols).to(dtype),
        "target": torch.zeros(rows, dtype=torch.long),
        "anchor": torch.zeros(rows, dtype=exact_of(dtype)),
        "bias": None,
        "scale": 1.0,
        "cap": 0.0,
        "factor": None,
        "write": True,
        "statistics": True,
    }
    return {**arguments, **changes}


def logit_grad_arguments(rows=3, cols=5, dtype=torch.float32, **changes):
    exact = exact_of(dtype)
    arguments = {
        "tile": torch.randn(rows, cols).to(dtype),
        "target": torch.zeros(rows, dtype=torch.long),
        "anchor": torch.zeros(rows, dtype=exact),
        "norm": torch.ones(rows, dtype=exact),
        "logp": torch.zeros(rows, dtype=exact),
        "grad_logp": torch.ones(rows, dtype=exact),
        "grad_lse": torch.ones(rows, dtype=exact),
        "grad_entropy": torch.ones(rows, dtype=exact),
        "entropy": torch.ones(rows, dtype=exact),
        "bias": torch.zeros(cols, dtype=exact),
        "scale": 1.0,
        "cap": 0.0,
        "factor": None,
    }
    return {**arguments, **changes}


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


BAD_VECTORS = [
    (torch.zeros(4), "shape"),
    (torch.zeros(3, 1), "shape"),
    (torch.zeros(3, dtype=torch.float64), "dtype"),
    (torch.zeros(6)[::2], "contiguous"),
]


@pytest.mark.parametrize("call", [exp_rows_arguments, logit_grad_arguments])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tile", torch.zeros(3), "tile.*rows, cols"),
        ("tile", torch.zeros(3, 5, dtype=torch.int32), "tile.*float64.*float16.*cast"),
        ("tile", torch.zeros(5, 3).t(), "tile.*contiguous rows.*stride"),
        ("target", torch.zeros(3, dtype=torch.int32), "target.*int64"),
        ("target", torch.zeros(2, dtype=torch.long), r"target.*\(3,\)"),
        ("bias", torch.zeros(4), r"bias.*\(5,\)"),
        ("bias", torch.zeros(5, dtype=torch.float64), "bias.*dtype"),
        *(("anchor", value, f"anchor.*{message}") for value, message in BAD_VECTORS),
        *(("factor", value, f"factor.*{message}") for value, message in BAD_VECTORS),
    ],
)
def test_argument_checks(call, name, value, message):
    arguments = call(**{name: value})
    with pytest.raises(RuntimeError, match=message):
        (ops.exp_rows_ if call is exp_rows_arguments else ops.logit_grad_)(**arguments)


@pytest.mark.parametrize(
    "name", ["norm", "logp", "grad_logp", "grad_lse", "grad_entropy", "entropy"]
)
@pytest.mark.parametrize("value, message", BAD_VECTORS)
def test_row_vectors_of_logit_grad(name, value, message):
    with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
        ops.logit_grad_(**logit_grad_arguments(**{name: value}))


def test_entropy_comes_with_its_gradient():
    with pytest.raises(RuntimeError, match="entropy must come with grad_entropy"):
        ops.logit_grad_(**logit_grad_arguments(entropy=None))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_tiles(shape):
    rows, cols = shape
    sums, best = ops.exp_rows_(**exp_rows_arguments(rows, cols))
    assert sums.shape == (6, rows) and best.shape == (rows,)
    assert (sums[1] == 0).all()
    ops.logit_grad_(**logit_grad_arguments(rows, cols))


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


MATRICES = {
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(9, 4),
    "target": torch.zeros(3).long(),
    "bias": torch.zeros(9),
    "scale": 1.0,
    "cap": 0.0,
}
SETTLED = {
    "exps": torch.zeros(3, 4),
    **{name: torch.zeros(3) for name in ("anchor", "sum", "offset", "best", "raw", "logit")},
    "column": torch.zeros(3).long(),
    "scale": 1.0,
    "cap": 0.0,
}
ROWS = {"out": torch.zeros(3, 4), "input": torch.zeros(3, 4), "factor": torch.zeros(3)}


@pytest.mark.parametrize(
    "op, name, value, message",
    [
        ("target_logits", "hidden", torch.zeros(4), "hidden.*rows, H"),
        ("target_logits", "hidden", torch.zeros(4, 3).t()[:3], "hidden.*contiguous rows"),
        ("target_logits", "hidden", torch.zeros(3, 4).int(), "hidden.*float64.*float16"),
        ("target_logits", "weight", torch.zeros(9, 5), "weight.*rows, 4"),
        ("target_logits", "weight", torch.zeros(9, 4).double(), "weight.*dtype"),
        ("target_logits", "target", torch.zeros(2).long(), r"target.*\(3,\)"),
        ("target_logits", "target", torch.zeros(3).int(), "target.*int64"),
        ("target_logits", "bias", torch.zeros(4), r"bias.*\(9,\)"),
        ("target_logits", "bias", torch.zeros(9).double(), "bias.*dtype"),
        ("settle_rows_", "exps", torch.zeros(3), r"exps.*rows, V"),
        ("settle_rows_", "exps", torch.zeros(3, 4).int(), "exps.*float64.*float16"),
        ("settle_rows_", "exps", torch.zeros(2, 4), "exps.*3 rows"),
        ("settle_rows_", "exps", torch.zeros(4, 3).t(), "exps.*contiguous rows"),
        ("settle_rows_", "anchor", torch.zeros(3, 1), r"anchor.*\(rows,\)"),
        ("settle_rows_", "column", torch.zeros(3).int(), "column.*int64"),
        *(
            ("settle_rows_", name, value, f"{name}.*{message}")
            for name in ("sum", "offset", "best", "raw", "logit")
            for value, message in BAD_VECTORS
        ),
        ("scale_rows_", "input", torch.zeros(3), r"rows, H"),
        ("scale_rows_", "out", torch.zeros(2, 4), r"out.*rows, H"),
        ("scale_rows_", "out", torch.zeros(3, 5), r"out.*rows, 4"),
        ("scale_rows_", "out", torch.zeros(3, 4).half(), "out.*dtype"),
        ("scale_rows_", "factor", torch.zeros(3).double(), "factor.*dtype"),
        ("scale_rows_", "factor", torch.zeros(4), r"factor.*\(3,\)"),
    ],
)
def test_matrix_argument_checks(op, name, value, message):
    given = {"target_logits": MATRICES, "settle_rows_": SETTLED, "scale_rows_": ROWS}[op]
    arguments = {**given, name: value}
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_opcheck_exp_rows(dtype, statistics, cap):
    arguments = exp_rows_arguments(dtype=dtype, statistics=statistics, cap=cap)
    torch.library.opcheck(ops.exp_rows_.default, (), arguments, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_logit_grad(dtype, optional):
    arguments = logit_grad_arguments(dtype=dtype)
    if not optional:
        for name in ("grad_lse", "grad_entropy", "entropy", "bias"):
            arguments[name] = None
    torch.library.opcheck(ops.logit_grad_.default, (), arguments, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_matrices(dtype):
    hidden, weight = torch.randn(3, 4).to(dtype), torch.randn(9, 4).to(dtype)
    target, factor = torch.randint(0, 9, (3,)), torch.randn(3).to(exact_of(dtype))
    for bias in (None, torch.randn(9).to(exact_of(dtype))):
        torch.library.opcheck(
            ops.target_logits.default,
            (hidden, weight, target, bias, 1.0, 0.0),
            test_utils=CHECKS,
        )
    out = torch.zeros_like(hidden)
    torch.library.opcheck(ops.scale_rows_.default, (out, hidden, factor), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_settle_rows(dtype, optional):
    exact = exact_of(dtype)
    arguments = {
        name: one.to(exact) if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for name, one in SETTLED.items()
    }
    arguments["exps"] = torch.zeros(3, 4, dtype=dtype) if optional else None
    arguments["best"] = arguments["best"] if optional else None
    torch.library.opcheck(ops.settle_rows_.default, (), arguments, test_utils=CHECKS)
