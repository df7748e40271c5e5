# SPDX-License-Identifier: Apache-2.0
"""The compiled operators by themselves: conversions, exponentials, argument checks, schemas."""

import math

import pytest
import torch

from fastpref.scoring.backends import torch as torch_backend
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


def score_rows_arguments(rows=5, cols=37, dtype=torch.float32, **changes):
    arguments = {
        "tile": torch.randn(rows, cols).to(dtype),
        "hidden": torch.randn(rows, 8).to(dtype),
        "weight": torch.randn(cols, 8).to(dtype),
        "target": torch.randint(0, max(cols, 1), (rows,)),
        "bias": None,
        "scale": 1.0,
        "cap": 0.0,
        "write": True,
        "statistics": True,
    }
    return {**arguments, **changes}


def score_in_steps(tile, hidden, weight, target, bias, scale, cap, write, statistics):
    """What ``score_rows_`` does, by the three operators that it joins."""
    column, raw, logit = ops.target_logits(hidden, weight, target, bias, scale, cap)
    sums, best_index = ops.exp_rows_(tile, column, logit, bias, scale, cap, None, write, statistics)
    own = RowSums.of(sums, best_index if statistics else None)
    given = own.anchor, own.sum, own.offset, own.best, column, raw, logit
    scores = ops.settle_rows_(tile if write else None, *given, scale, cap)
    return torch.cat([raw[None], logit[None], sums, scores]), best_index


def same_bits(one, other):
    """NaN equals NaN, and -0.0 is not 0.0."""
    assert one.dtype == other.dtype and one.shape == other.shape
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    nan = one.isnan()
    assert torch.equal(nan, other.isnan())
    assert torch.equal(one[~nan].view(size), other[~nan].view(size))


def outputs_and_tile(operator, arguments):
    tile = arguments["tile"].clone(memory_format=torch.preserve_format)
    return *operator(**{**arguments, "tile": tile}), tile


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map", [(1.0, 0.0), (0.7, 0.0), (1.3, 20.0)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
def test_rows_are_scored_as_in_steps(dtype, map, biased, write, statistics):
    """Targets of other ranks and of none, a column that rises above its anchor, and rows that are
    lost to NaN among them; the matrices begin at any address."""
    rows, cols = 61, 1031
    hidden = torch.randn(rows, 30)[:, 1:24].to(dtype)
    weight = torch.randn(cols, 29).to(dtype)[:, 3:26]
    tile = (hidden.double() @ weight.double().t()).to(dtype)
    tile[7, 600], tile[8] = 400, -300
    tile[9, 3], tile[10, 4], tile[11] = torch.nan, INF, -INF
    target = torch.randint(0, cols, (rows,))
    target[:5] = torch.tensor([-1, cols, 10**12, -100, cols - 1])
    arguments = score_rows_arguments(
        tile=tile,
        hidden=hidden,
        weight=weight,
        target=target,
        bias=torch.randn(cols, dtype=exact_of(dtype)) if biased else None,
        scale=map[0],
        cap=map[1],
        write=write,
        statistics=statistics,
    )
    found = outputs_and_tile(ops.score_rows_, arguments)
    expected = outputs_and_tile(score_in_steps, arguments)
    for one, other in zip(found, expected, strict=True):
        same_bits(one, other)
    if not write:
        same_bits(found[2], tile)


@pytest.mark.parametrize("rows, cols, width", [(0, 5, 8), (1, 1, 1), (3, 2, 0), (70, 3001, 9)])
def test_rows_are_scored_alike_at_any_size(rows, cols, width):
    """And nothing beside a tile that is a slice of a wider one is touched."""
    wide = torch.randn(rows, cols + 20)
    hidden, weight = torch.randn(rows, width), torch.randn(cols, width)
    arguments = score_rows_arguments(rows, cols, hidden=hidden, weight=weight)
    arguments["tile"] = wide[:, 7 : 7 + cols].contiguous()
    expected = outputs_and_tile(score_in_steps, arguments)
    before = wide.clone()
    inside = wide[:, 7 : 7 + cols]
    found = *ops.score_rows_(**{**arguments, "tile": inside}), inside
    for one, other in zip(found, expected, strict=True):
        same_bits(one, other.contiguous())
    same_bits(wide[:, :7], before[:, :7])
    same_bits(wide[:, 7 + cols :], before[:, 7 + cols :])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tile", torch.zeros(5), "tile.*rows, cols"),
        ("tile", torch.zeros(37, 5).t(), "tile.*contiguous rows.*stride"),
        ("tile", torch.zeros(5, 37).double(), "hidden.*dtype of tile"),
        ("tile", torch.zeros(5, 36), "weight.*36 columns of tile.*37"),
        ("tile", torch.zeros(4, 37), r"target.*\(4,\)"),
        ("target", torch.zeros(5).int(), "target.*int64"),
        ("target", torch.zeros(4).long(), r"target.*\(5,\)"),
        ("target", torch.zeros(5, 1).long(), r"target.*\(5,\)"),
        ("target", torch.zeros(10).long()[::2], "target.*contiguous"),
        ("bias", torch.zeros(36), r"bias.*\(37,\)"),
        ("bias", torch.zeros(37).double(), "bias.*dtype"),
        ("bias", torch.zeros(74)[::2], "bias.*contiguous"),
        ("hidden", torch.zeros(4, 8), r"hidden.*\(5, H\)"),
        ("hidden", torch.zeros(5), r"hidden.*\(5, H\)"),
        ("hidden", torch.zeros(8, 5).t(), "hidden.*contiguous rows"),
        ("weight", torch.zeros(37, 7), r"weight.*\(rows, 8\)"),
        ("weight", torch.zeros(36, 8), "weight.*37 columns of tile.*36"),
        ("weight", torch.zeros(37, 8).double(), "weight.*dtype"),
        ("weight", torch.zeros(8, 37).t(), "weight.*contiguous rows"),
    ],
)
def test_arguments_of_score_rows(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops.score_rows_(**score_rows_arguments(**{name: value}))


def test_rows_of_integers_are_not_scored():
    with pytest.raises(RuntimeError, match=r"tile.*float64.*float16.*cast"):
        ops.score_rows_(**score_rows_arguments(dtype=torch.int32))


EXACT = (torch.float32, torch.float64)
LOGP = 5  # of the numbers without statistics


def places_of(total, rows):
    return torch.randperm(total)[:rows].sort().values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map", [(1.0, 0.0), (1.3, 20.0)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("rows, total", [(61, 61), (61, 200), (1, 9), (0, 9)])
def test_a_batch_is_scored_as_its_rows(dtype, map, biased, write, rows, total):
    """And elsewhere in the batch lies 0."""
    cols = 1031
    places = None if rows == total else places_of(total, rows)
    target = torch.randint(0, cols, (total,))
    target[3] = cols + 5
    own = target if places is None else target[places]
    arguments = score_rows_arguments(
        rows,
        cols,
        dtype,
        target=own,
        bias=torch.randn(cols, dtype=exact_of(dtype)) if biased else None,
        scale=map[0],
        cap=map[1],
        write=write,
        statistics=False,
    )
    numbers, _, exps = outputs_and_tile(ops.score_rows_, arguments)
    expected = torch.zeros(total, dtype=exact_of(dtype))
    if places is None:
        expected = numbers[LOGP].clone()
    else:
        expected[places] = numbers[LOGP]
    del arguments["statistics"]
    found = outputs_and_tile(ops.score_batch_, {**arguments, "target": target, "places": places})
    for one, other in zip(found, (expected, numbers, exps), strict=True):
        same_bits(one, other)
    assert found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()
    if total % 4 == 0:
        given = {**arguments, "target": target.view(4, -1), "places": places}
        same_bits(outputs_and_tile(ops.score_batch_, given)[0], expected.view(4, -1))


PLACES = [
    (torch.tensor([0, 2, 9, 3, 1]), r"places must be in \[0, 9\), got 9"),
    (torch.tensor([0, -1, 8, 3, 1]), r"places must be in \[0, 9\), got -1"),
    (torch.zeros(5, 1).long(), "places.*shape"),
    (torch.zeros(5).int(), "places.*int64"),
    (torch.zeros(10).long()[::2], "places.*contiguous"),
    (torch.arange(4), r"\(4,\)|target.*\(5,\)|scale.*\(4,\)"),
]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("target", torch.zeros(9).int(), "target.*int64"),
        ("target", torch.zeros(18).long()[::2], "target.*contiguous"),
        ("tile", torch.zeros(37, 5).t(), "tile.*contiguous rows.*stride"),
        ("weight", torch.zeros(36, 8), "weight.*37 columns of tile.*36"),
        *(("places", value, message) for value, message in PLACES),
    ],
)
def test_arguments_of_score_batch(name, value, message):
    arguments = score_rows_arguments(target=torch.zeros(9).long(), places=torch.arange(5))
    del arguments["statistics"]
    with pytest.raises(RuntimeError, match=message):
        ops.score_batch_(**{**arguments, name: value})


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


VECTOR = {"gradient": torch.zeros(3), "scale": torch.zeros(3), "rate": 1.0, "places": None}


@pytest.mark.parametrize("value, message", PLACES)
def test_places_of_gradient_factors(value, message):
    arguments = {**VECTOR, "gradient": torch.zeros(9), "scale": torch.zeros(5), "places": value}
    with pytest.raises(RuntimeError, match=message):
        ops.gradient_factors(**arguments)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("gradient", torch.zeros(3, 1), "gradient.*shape.*2 dimensions"),
        ("gradient", torch.tensor(1.0), "gradient.*shape.*0 dimensions"),
        ("gradient", torch.zeros(6)[::2], "gradient.*contiguous"),
        ("gradient", torch.zeros(3).half(), "gradient.*float32 or float64"),
        ("gradient", torch.zeros(3).long(), "gradient.*float32 or float64"),
        *(("scale", value, f"scale.*{message}") for value, message in BAD_VECTORS),
    ],
)
def test_arguments_of_gradient_factors(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops.gradient_factors(**{**VECTOR, name: value})


def patterns(rows):
    """Which of the rows there are: none, one, some, all but one, all."""
    some = torch.rand(rows) < 0.4
    one = torch.arange(rows) == rows // 2
    return {"none": one & ~one, "one": one, "some": some, "but one": ~one, "all": one | ~one}


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


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_what_counts_as_a_gradient(dtype):
    """All that is not equal to 0: the smallest number and NaN, but no zero of either sign."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = [torch.nan, 0.0, -0.0, INF, -INF, smallest, -smallest, -0.0, 1.0]
    places, count = ops.nonzero_places(torch.tensor(values, dtype=dtype))
    assert places.tolist() == [0, 3, 4, 5, 6, 8] and count == 6


@pytest.mark.parametrize(
    "operator, value, message",
    [
        ("scored_places", torch.zeros(3, 1).long(), "target.*shape.*2 dimensions"),
        ("scored_places", torch.tensor(3), "target.*shape.*0 dimensions"),
        ("scored_places", torch.zeros(6).long()[::2], "target.*contiguous"),
        ("scored_places", torch.zeros(3).int(), "target.*int64"),
        ("scored_places", torch.zeros(3), "target.*int64"),
        ("nonzero_places", torch.zeros(3, 1), "gradient.*shape.*2 dimensions"),
        ("nonzero_places", torch.tensor(3.0), "gradient.*shape.*0 dimensions"),
        ("nonzero_places", torch.zeros(6)[::2], "gradient.*contiguous"),
        ("nonzero_places", torch.zeros(3).half(), "gradient.*float32 or float64"),
        ("nonzero_places", torch.zeros(3).long(), "gradient.*float32 or float64"),
    ],
)
def test_arguments_of_places(operator, value, message):
    rest = (-100,) if operator == "scored_places" else ()
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, operator)(value, *rest)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_opcheck_score_rows(dtype, write, statistics, cap):
    arguments = score_rows_arguments(dtype=dtype, write=write, statistics=statistics, cap=cap)
    arguments["bias"] = torch.randn(37, dtype=exact_of(dtype)) if write else None
    torch.library.opcheck(ops.score_rows_.default, (), arguments, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("write", [False, True])
def test_opcheck_score_batch(dtype, write):
    for places, total in ((torch.arange(5), 9), (None, 5)):
        target = torch.zeros(total, dtype=torch.int64)
        given = score_rows_arguments(dtype=dtype, write=write, target=target, places=places)
        del given["statistics"]
        torch.library.opcheck(ops.score_batch_.default, (), given, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_opcheck_vectors(dtype):
    gradient, scale = torch.randn(2, 9, dtype=dtype)
    # Their count is an int, which no fake of a tracer can stand for.
    without_fakes = CHECKS[:2]
    for places in (None, torch.arange(9)):
        given = gradient, scale, 0.7, places
        torch.library.opcheck(ops.gradient_factors.default, given, test_utils=without_fakes)
    for there in patterns(9).values():
        given = (torch.where(there, gradient, 0.0),)
        torch.library.opcheck(ops.nonzero_places.default, given, test_utils=without_fakes)
        given = torch.where(there, 3, -100), -100
        torch.library.opcheck(ops.scored_places.default, given, test_utils=without_fakes)
