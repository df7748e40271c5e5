# SPDX-License-Identifier: Apache-2.0
"""The rows backend: linear_logprob against float64 over schedules, logit maps, odd shapes,
overflowing rows and statistics, and the kernels themselves where a row is split."""

import itertools
from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from fastpref import ScoringOptions
from fastpref.bench import predictions
from fastpref.bench.predictions import Call
from fastpref.scoring.backends import UpstreamGradient, rows
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.rows import TargetLogits
from fastpref.scoring.slab import Products
from fastpref.scoring.statistics import OUTPUTS, token_scores
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import check_scores, make_case, run, upstream_of, verify
from tests.scoring.test_numbers import FEATURES, SCHEDULES, dtype_name, options_of

pytestmark = pytest.mark.skipif(not rows.INTERPRETED, reason="a GPU is here: see pytest -m gpu")
dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=dtype_name,
)
# Two steps of 16-bit rows, three of float32 ones, the last not filled.
SIZES = {"rows": 20, "hidden": 37, "vocab": 163}


def options(dtype, schedule, **changes):
    return options_of("rows", dtype, **{**SCHEDULES[schedule], **changes}, vocab=SIZES["vocab"])


def sample(*axes):
    """The product of ``axes``, of which a third belongs to the ordinary tests: every value of an
    axis with every one of the next."""
    numbers = itertools.product(*(range(len(axis)) for axis in axes))
    return [
        pytest.param(*case, marks=[] if sum(at) % 3 == 0 else pytest.mark.slow)
        for at, case in zip(numbers, itertools.product(*axes), strict=True)
    ]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    "feature, schedule, dtype", sample(FEATURES, ["auto", "recompute", "slabs", "keep"], DTYPES)
)
def test_logp(dtype, schedule, feature):
    verify(options(dtype, schedule), dtype, **SIZES, **FEATURES[feature])


@pytest.mark.heavy
@pytest.mark.parametrize(
    "feature, schedule, dtype",
    sample(["plain", "bias", "softcap", "temperature"], ["keep", "recompute"], DTYPES),
)
def test_all_outputs(dtype, schedule, feature):
    verify(
        options(dtype, schedule),
        dtype,
        outputs=OUTPUTS,
        differentiated=("logp", "entropy", "mean_logits", "lse"),
        **SIZES,
        **FEATURES[feature],
    )


@pytest.mark.heavy
@dtypes
def test_frozen_head_and_no_gradient(dtype):
    verify(options(dtype, "auto"), dtype, needs=("hidden",), **SIZES)
    verify(options(dtype, "chunked"), dtype, outputs=OUTPUTS, differentiated=(), **SIZES)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "below, schedule, outputs, dtype",
    sample([0.1, 1.0], ["keep", "recompute"], [("logp",), OUTPUTS], DTYPES[::-1]),
)
def test_targets_far_below_the_maximum(dtype, schedule, below, outputs):
    """100 to 1000 nats: rows move their anchor."""
    verify(options(dtype, schedule), dtype, outputs=outputs, below=below, ignored=0.1, **SIZES)


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize(
    "rows, hidden, vocab", [(1, 1, 1), (1, 48, 257), (5, 1, 63), (3, 32, 64), (2, 7, 2)]
)
@pytest.mark.parametrize("outputs", [("logp",), OUTPUTS], ids=["logp", "all"])
def test_odd_sizes(dtype, rows, hidden, vocab, outputs):
    given = ScoringOptions(backend="rows")
    sizes = {"rows": rows, "hidden": hidden, "vocab": vocab}
    verify(given, dtype, **sizes, bias=True, outputs=outputs)


@pytest.mark.heavy
def test_double_takes_plain_torch():
    verify(ScoringOptions(backend="rows"), torch.float64, outputs=OUTPUTS, **SIZES)


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_masked_columns(dtype, schedule):
    """A bias of -inf on half of the columns, none of them a target."""
    case = make_case(dtype=dtype, bias=True, ignored=0.2, **SIZES)
    bias = case.bias.clone()
    bias[torch.rand(len(bias), generator=torch.Generator().manual_seed(5)) < 0.5] = -torch.inf
    bias[case.target[case.scored]] = 0
    case = replace(case, bias=bias)
    upstream = upstream_of(case, ("logp",))
    actual, eager, exact = (
        run(case.to(one), outputs=("logp", "entropy", "mean_logits"), upstream=upstream, **how)
        for one, how in (
            (dtype, {"options": options(dtype, schedule)}),
            (dtype, {"reference": True}),
            (torch.float64, {"reference": True}),
        )
    )
    check_scores(case, actual, eager, exact)


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_alone(dtype, value):
    case = make_case(dtype=dtype, **SIZES)
    tile = (case.hidden @ case.weight.t()).clone()
    clean = tile.clone()
    tile[3, 40] = value
    anchor = torch.zeros(len(tile))
    both = [
        rows.exp_rows(Products(one, None, MAPS[0]), case.target, anchor, True, True)
        for one in (tile, clean)
    ]
    others = torch.arange(len(tile)) != 3
    assert torch.equal(tile[others], clean[others])
    assert torch.equal(both[0].sum[others], both[1].sum[others])
    if value > 0 or value != value:
        assert not both[0].sum[3].isfinite()


MAPS = (LogitMap(1.0, 0.0), LogitMap(-1.3, 0.0), LogitMap(0.7, 3.0))


def tile_of(products, padded):
    """Rows that begin at multiples of 16 bytes, or one element after."""
    count, cols = products.shape
    stride = -(-cols // 8) * 8 + (0 if padded else 1)
    room = torch.full((count, stride), 7.0, dtype=products.dtype)
    room[:, :cols] = products
    return room[:, :cols]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "map, padded, cols, dtype", sample(MAPS, [True, False], [160, 163, 400], DTYPES)
)
def test_split_rows(monkeypatch, dtype, padded, cols, map):
    """One row's columns among several programs, some of which move their anchor: as one program
    does it, and as plain torch does."""
    products = (torch.randn(4, cols) * 3).to(dtype)
    products[1] *= 40
    products[2, cols // 2 :] *= 20
    target = torch.tensor([3, cols - 1, 0, cols + 5])
    bias = torch.randn(cols)
    raw = (products.float() + bias).gather(1, target.clamp(max=cols - 1)[:, None])[:, 0]
    own = TargetLogits(torch.where(target < cols, target, -1), raw, map.logit(raw))
    for statistics, write in itertools.product((False, True), repeat=2):
        outputs = ("logp", "entropy", "log_sum_sq_probs", "is_top1") if statistics else ("logp",)
        found = []
        for shares in (1, 3, None):
            tile = tile_of(products, padded)
            arguments = Products(tile, bias, map), target, own.logit, write, statistics
            if shares is None:
                sums = torch_backend.exp_rows(*arguments)
            else:
                monkeypatch.setattr(rows, "_shares", lambda tile, flags, shares=shares: shares)
                sums = rows.exp_rows(*arguments)
            kept = tile if write else None
            scored, scale = torch_backend.settle(sums, own, kept, map)
            scores = token_scores(outputs, sums, scored, target, own.logit, cols)
            named = {n: v.double() for n, v in scores._asdict().items() if v is not None}
            if write:
                named["exponentials"] = tile.double() * scale[:, None].double()
            else:
                assert torch.equal(tile, products)
            found.append(named)
        tolerance = 2 * torch.finfo(dtype).eps if write else 0
        for one in found[:2]:
            for name, right in found[2].items():
                rounding = tolerance if name == "exponentials" else 0
                torch.testing.assert_close(
                    one[name], right, rtol=2e-5 + rounding, atol=2e-5, msg=f"{name} {write}"
                )


@pytest.mark.heavy
@dtypes
@pytest.mark.parametrize("capped", [False, True])
def test_each_row_its_own_map(dtype, capped):
    """A factor each: as one row after the other with numbers."""
    products = (torch.randn(5, 163) * 3).to(dtype)
    factor = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.1])
    target = torch.tensor([0, 5, 162, 99, 7])
    anchor = torch.randn(5)
    upstream = UpstreamGradient(
        anchor, torch.full((5,), 50.0), -torch.rand(5), *[torch.randn(5)] * 4
    )
    whole = tile_of(products, True), tile_of(products, True)
    by_row = LogitMap(-0.8, 2.5 if capped else 0.0, factor)
    sums = rows.exp_rows(Products(whole[0], None, by_row), target, anchor, True, True)
    rows.logit_grad(Products(whole[1], None, by_row), target, upstream)
    for i in range(5):
        alone = tile_of(products[i : i + 1], True), tile_of(products[i : i + 1], True)
        at = slice(i, i + 1)
        map = LogitMap(*(float(one * factor[i]) for one in by_row[:2]))
        both = [Products(one, None, map) for one in alone]
        one = rows.exp_rows(both[0], target[at], anchor[at], True, True)
        rows.logit_grad(both[1], target[at], UpstreamGradient(*(v[at] for v in upstream)))
        for name in ("sum", "best", "weighted", "squares"):
            torch.testing.assert_close(getattr(one, name), getattr(sums, name)[at])
        for tile, own in zip(whole, alone, strict=True):
            torch.testing.assert_close(tile[at], own)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "feature, schedule, dtype",
    sample(["plain", "bias", "softcap"], ["keep", "recompute", "slabs"], DTYPES),
)
def test_temperatures(dtype, schedule, feature):
    given = {name: value for name, value in FEATURES[feature].items() if name != "temperature"}
    verify(
        options(dtype, schedule),
        dtype,
        uneven=True,
        outputs=OUTPUTS,
        differentiated=("logp", "entropy", "mean_logits", "lse"),
        **SIZES,
        **given,
    )
    verify(options(dtype, schedule), dtype, uneven=True, **SIZES, **given)


@pytest.mark.heavy
@dtypes
def test_the_same_bits_every_time(dtype):
    case = make_case(dtype=dtype, below=0.2, **SIZES)
    upstream = upstream_of(case, ("logp",))
    runs = [run(case, options=ScoringOptions(backend="rows"), upstream=upstream) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.heavy
@pytest.mark.parametrize("statistics", [False, True])
def test_a_shard_of_nothing_but_minus_infinity_has_a_finite_anchor(statistics):
    """Whatever another shard adds must not turn NaN."""
    sums = rows.exp_rows(
        Products(torch.randn(3, 70), torch.full((70,), -torch.inf), MAPS[0]),
        torch.tensor([-1, 0, 69]),
        torch.tensor([0.5, -torch.inf, torch.nan]),
        False,
        statistics,
    )
    assert sums.sum.tolist() == [0, 0, 0]
    assert sums.anchor.isfinite().all() and sums.anchor[0] == 0.5
    if statistics:
        assert sums.weighted.tolist() == sums.squares.tolist() == [0, 0, 0]


def test_few_rows_are_split(monkeypatch):
    monkeypatch.setattr(rows, "_processors", lambda device: 132)
    flags = {"PIECES": 256, "VECTOR": 4}
    # No more shares than steps, nor than are joined.
    for count, cols, shares in ((1, 10**5, 64), (100, 10**5, 3), (264, 10**5, 1), (1, 5000, 5)):
        assert rows._shares(torch.empty(count, cols), flags) == shares


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_bytes_a_logit(monkeypatch, dtype, write, moved):
    """Counted from loads and stores: one read and one write; of halves that are kept two reads; of
    a row that moves its anchor both once more."""
    moves = {"load": 0, "store": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def wide(pointers, mask):
        small = pointers.get_element_ty().primitive_bitwidth == 16
        return 2 * int(mask.data.sum()) if small else 0

    def counted_load(self, pointers, mask, *given):
        moves["load"] += wide(pointers, mask)
        return load(self, pointers, mask, *given)

    def counted_store(self, pointers, value, mask, *given):
        moves["store"] += wide(pointers, mask)
        return store(self, pointers, value, mask, *given)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    tile = torch.zeros(4, 400, dtype=dtype)
    tile[:, 7] = 50.0 if moved else 1.0
    # More rows than programs are wanted: none is split.
    target, anchor = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    products = Products(tile, None, MAPS[0])
    rows.exp_rows(products, target, anchor, write, False)
    halves = write and dtype == torch.float16
    read = 1 + moved + halves
    written = write * (1 + (moved and not halves))
    assert (moves["load"], moves["store"]) == (2 * read * tile.numel(), 2 * written * tile.numel())
    if not moved:
        element = "fp16" if dtype == torch.float16 else "bf16"
        passes = [predictions.PASSES[one] for one in Call("", kept=write).passes(element)]
        assert [sum(both) for both in zip(*passes, strict=True)] == [read, written]
    upstream = UpstreamGradient(*torch.rand(4, 4), None, None, None)
    moves |= {"load": 0, "store": 0}
    rows.logit_grad(products, target, upstream)
    assert moves == {"load": 2 * tile.numel(), "store": 2 * tile.numel()}
    assert predictions.PASSES["logit_grad_rows"] == (1, 1)
