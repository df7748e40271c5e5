# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the CUDA row kernels, run on the host.

Not seen here: the rounding of the device's exp and tanh, launches, streams, and speed.
"""

from collections.abc import Iterator

import pytest
import torch

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring import backends
from fastpref.scoring.backends import UpstreamGradient
from fastpref.scoring.backends.tiled import Tiled
from fastpref.scoring.slab import Products, Slab
from fastpref.scoring.types import LogitMap, statistics_dtype
from tests.cuda_on_host.kernels import ELEMENTS, Kernels, compile_kernels, unavailable_reason
from tests.rows import make_rows
from tests.scoring.settling import MAPS, check_settle, check_settle_alone, check_target_logits

pytestmark = pytest.mark.heavy

# Largest relative error of one rounding to the element type.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in ELEMENTS}
GUARD = 30.0


def plain(tile: torch.Tensor) -> Products:
    return Products(tile, None, MAPS["plain"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Handing these small tensors to a second thread takes longer than the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return compile_kernels(tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_exp_rows(
    kernels: Kernels, dtype: torch.dtype, statistics: bool, map: LogitMap, blocks: int
) -> None:
    # Several pieces a thread, an odd number of columns: every row is aligned differently.
    rows = make_rows(dtype, 9001, map)
    guarded, tile, target, anchor, bias, logit, slope, own = rows
    before = guarded.clone()
    arguments = (Products(tile, bias, map), target, anchor)
    read_only = kernels.exp_rows(*arguments, False, statistics, blocks=blocks)
    assert torch.equal(guarded, before)
    sums = kernels.exp_rows(*arguments, True, statistics, blocks=blocks)
    assert bool((guarded[:, 0] == 7).all()) and bool((guarded[:, -2:] == 7).all())

    position = torch.arange(tile.shape[1])[None] == target[:, None]
    others = logit.masked_fill(position, -torch.inf)
    highest, given = others.amax(1).clamp(min=-1e30), anchor.double()
    kept = given.isfinite() & (highest - given <= GUARD)
    expected = torch.where(kept, given, highest)
    # Logits that a map rounds are wrong by up to half their last bit; products as they are are not.
    digits = 2e-6 if map == MAPS["plain"] else 3e-5
    digits = 1e-12 if dtype == torch.float64 else digits
    close = {"rtol": digits, "atol": 0.0, "check_dtype": False}
    torch.testing.assert_close(sums.anchor, expected, **close)
    shifted = others - sums.anchor.double()[:, None]
    exps = shifted.exp()
    torch.testing.assert_close(sums.sum, exps.sum(1), **close)
    norm = exps.sum(1) + (own - sums.anchor.double()).exp()
    offset = norm.log() if dtype == torch.float16 else torch.zeros_like(norm)
    torch.testing.assert_close(sums.offset, offset, rtol=digits, atol=digits, check_dtype=False)
    torch.testing.assert_close(
        tile.double(),
        exps / offset.exp()[:, None] * slope,
        rtol=digits + 2.1 * ROUNDING[dtype],
        # A half's spacing near 0; the last that a factor to a far anchor leaves of e^GUARD.
        atol=2.0**-24 if dtype == torch.float16 else 1e-25,
    )
    for one, other in zip(read_only, sums, strict=True):
        if one is not None and other is not None and one is not read_only.offset:
            assert torch.equal(one, other)
    if not statistics:
        return
    torch.testing.assert_close(sums.best, logit.amax(1), **close)
    assert sums.best_index is not None and torch.equal(sums.best_index, logit.argmax(1))
    # About the largest logit, not the anchor: all terms have one sign.
    weighted = torch.where(exps > 0, exps * (others - logit.amax(1)[:, None]), 0.0).sum(1)
    # Where one logit stands alone, t - best is its rounding.
    torch.testing.assert_close(sums.weighted, weighted, **{**close, "atol": digits})
    torch.testing.assert_close(sums.squares, exps.square().sum(1), **close)
    if map.cap == 0:
        assert sums.total is None
        return
    total = logit.sum(1) - torch.where(own.isinf(), 0.0, own)
    slack = digits * logit.abs().nan_to_num(posinf=0).sum(1).max().item()
    torch.testing.assert_close(sums.total, total, rtol=0, atol=slack, check_dtype=False)


@pytest.mark.parametrize("cap", [0.0, 20.0])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_each_row_its_own_map(
    kernels: Kernels, dtype: torch.dtype, blocks: int, cap: float
) -> None:
    """Factors that are powers of 2: bit by bit what one row after the other gives with numbers."""
    exact = statistics_dtype(dtype)
    factor = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=exact)
    map, bias = LogitMap(0.75, cap, factor), torch.randn(9008, dtype=exact)
    products = (3 * torch.randn(4, 9008)).to(dtype)
    products[1, 7] = 95  # moves the anchor
    target, (anchor, *others) = torch.tensor([3, -1, 9000, 44]), torch.randn(7, 4, dtype=exact)
    upstream = UpstreamGradient(anchor, others[0].exp(), -others[1].abs(), *others[2:])
    exps, grads = products.clone(), products.clone()
    sums = kernels.exp_rows(Products(exps, bias, map), target, anchor, True, True, blocks=blocks)
    kernels.logit_grad(Products(grads, bias, map), target, upstream)
    for i in range(4):
        at, numbers = slice(i, i + 1), LogitMap(*(float(one * factor[i]) for one in map[:2]))
        one, two = (Products(products[at].clone(), bias, numbers) for _ in range(2))
        alone = kernels.exp_rows(one, target[at], anchor[at], True, True, blocks=blocks)
        kernels.logit_grad(two, target[at], upstream.of_rows(at))
        assert torch.equal(exps[at], one.tile) and torch.equal(grads[at], two.tile)
        for name, value in alone._asdict().items():
            assert value is None or torch.equal(value, getattr(sums, name)[at]), name


def test_logits_far_from_their_anchor_cost_no_digits(kernels: Kernels) -> None:
    """Rounding t - anchor alone would be wrong by up to 2^-20 here, the same way in a whole row."""
    tile = torch.rand(64, 1).expand(64, 600).contiguous()
    anchor = -29 + 8 * torch.rand(64)
    target = torch.full((64,), -1)
    exps = (tile.double() - anchor.double()[:, None]).exp()
    grad, one = tile.clone(), torch.ones(64)
    sums = kernels.exp_rows(plain(tile), target, anchor, True, False)
    torch.testing.assert_close(tile.double(), exps, rtol=2**-22, atol=0)
    torch.testing.assert_close(sums.sum.double(), exps.sum(1), rtol=2**-22, atol=0)
    upstream = UpstreamGradient(anchor, one, -one, -one, None, None, None)
    kernels.logit_grad(plain(grad), target, upstream)
    torch.testing.assert_close(grad.double(), exps, rtol=2**-22, atol=0)


@pytest.mark.parametrize("cols", [1, 5, 40])
@pytest.mark.parametrize("blocks", [1, 8])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_exp_rows_with_fewer_columns_than_threads(
    kernels: Kernels, dtype: torch.dtype, blocks: int, cols: int
) -> None:
    """Some blocks of the cluster have none at all."""
    buffer = torch.randn(4, cols + 1).to(dtype)
    before, tile = buffer.double().clone(), buffer[:, 1:]
    target = torch.tensor([0, cols - 1, -1, cols])
    anchor = torch.zeros(4, dtype=statistics_dtype(dtype))
    arguments = (plain(tile), target, anchor)
    sums = kernels.exp_rows(*arguments, True, False, blocks=blocks)
    assert torch.equal(buffer[:, 0].double(), before[:, 0])
    exps = before[:, 1:].exp().masked_fill(torch.arange(cols)[None] == target[:, None], 0.0)
    torch.testing.assert_close(sums.sum.double(), exps.sum(1), rtol=1e-6, atol=0)
    written = tile.double() * sums.offset.double().exp()[:, None]
    torch.testing.assert_close(written, exps, rtol=2 * ROUNDING[dtype] + 1e-6, atol=1e-6)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_no_barrier_is_missing(
    kernels: Kernels, dtype: torch.dtype, blocks: int, statistics: bool
) -> None:
    """The order in which warps run between barriers changes no bit."""
    written, results = [], []
    for backwards in (False, True):
        rows = make_rows(dtype, 4099, MAPS["capped"])
        products = Products(rows.tile, rows.bias, MAPS["capped"])
        arguments = (products, rows.target, rows.anchor)
        sums = kernels.exp_rows(*arguments, True, statistics, backwards, blocks)
        written.append(rows.guarded)
        results.append([one for one in sums if one is not None])
    assert torch.equal(*written)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_a_product_that_is_no_number_makes_its_row_nan_and_no_other(
    kernels: Kernels, dtype: torch.dtype, poison: float
) -> None:
    tile = torch.randn(3, 2000).to(dtype)
    tile[1, 700] = poison
    anchor = torch.zeros(3, dtype=statistics_dtype(dtype))
    target = torch.tensor([3, 4, 5])
    sums = kernels.exp_rows(plain(tile), target, anchor, True, False)
    assert sums.sum.isnan().tolist() == [False, True, False]
    assert tile.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("anchor", [0.0, -torch.inf])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_a_part_of_a_row_with_no_weight_at_all_is_written_as_zeros(
    kernels: Kernels, dtype: torch.dtype, statistics: bool, anchor: float
) -> None:
    """Another part of the vocabulary holds the target and all the weight."""
    tile = torch.full((1, 600), -torch.inf, dtype=dtype)
    anchors = torch.full((1,), anchor, dtype=statistics_dtype(dtype))
    target = torch.tensor([-1])
    sums = kernels.exp_rows(plain(tile), target, anchors, True, statistics)
    assert sums.anchor.isfinite().item()
    assert (sums.sum.item(), sums.offset.item()) == (0.0, 0.0)
    assert bool((tile == 0).all())


def test_a_target_that_is_no_number_makes_its_half_row_nan(kernels: Kernels) -> None:
    """Probabilities are normalised with the target."""
    tile, anchor = torch.randn(1, 600).half(), torch.zeros(1)
    tile[0, 70] = torch.nan
    sums = kernels.exp_rows(plain(tile), torch.tensor([70]), anchor, True, False)
    assert sums.offset.isnan().item() and tile.isnan().any().item()


@pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_logit_grad(
    kernels: Kernels, dtype: torch.dtype, with_entropy: bool, with_lse: bool, map: LogitMap
) -> None:
    cols, split, exact = 9001, 4097, statistics_dtype(dtype)
    raw = (3 * torch.randn(6, cols, dtype=torch.float64)).to(dtype)
    raw[2, 11] = 20  # nearly all the weight
    raw[3, ::5] = -torch.inf
    target = torch.tensor([0, split, 11, 4, cols - 1, split - 1])
    bias = torch.randn(cols, dtype=exact) if map.scale != 1 else None
    z = raw.double() if bias is None else raw.double() + bias.double()
    # A finite stand-in for -inf with the same gradient, 0.
    z = z.clamp(min=-1e4).requires_grad_()
    log_p = map.logit(z).log_softmax(1)
    logp, entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    lse = map.logit(z).logsumexp(1)
    g, h, k = torch.randn(3, 6, dtype=torch.float64)
    g[5] = h[5] = k[5] = 0
    loss = (g * logp).sum() + with_lse * (h * lse).sum() + with_entropy * (k * entropy).sum()
    (expected,) = torch.autograd.grad(loss, z)

    anchor = (lse + logp).detach() + 0.5
    values = (anchor, (lse - anchor).exp(), logp, g, h, k, entropy)
    upstream = UpstreamGradient(*(value.detach().to(exact) for value in values))
    if not with_lse:
        upstream = upstream._replace(grad_lse=None)
    if not with_entropy:
        upstream = upstream._replace(grad_entropy=None, entropy=None)
    guarded = torch.full((6, cols + 2), 7.0, dtype=dtype)
    guarded[:, 1:-1] = raw
    for part in (slice(0, split), slice(split, cols)):
        part_bias = None if bias is None else bias[part]
        tile = guarded[:, 1:-1][:, part]
        kernels.logit_grad(Products(tile, part_bias, map), target - part.start, upstream)
    assert bool((guarded[:, 0] == 7).all()) and bool((guarded[:, -1] == 7).all())
    digits = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(
        guarded[:, 1:-1].double(),
        expected,
        rtol=digits + 1.1 * ROUNDING[dtype],
        atol=(2.0**-24 if dtype == torch.float16 else 0) + digits * expected.abs().max().item(),
    )
    assert bool((guarded[5, 1:-1] == 0).all())


def test_logit_grad_of_a_target_nobody_holds_is_nan(kernels: Kernels) -> None:
    tile = torch.randn(2, 100)
    nan = torch.tensor([torch.nan, 1.0])
    zero, one = torch.zeros(2), torch.ones(2)
    upstream = UpstreamGradient(zero, nan, nan - 2, one, None, None, None)
    kernels.logit_grad(plain(tile), torch.tensor([-1, 5]), upstream)
    assert tile.isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("width", [3, 64, 5003])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_target_logits_of_any_width(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    """Rows of both matrices begin at any address; a target outside the weight gives NaN."""
    hidden = torch.randn(5, width + 1).to(dtype)[:, 1:]
    weight = torch.randn(9, width + 2).to(dtype)[:, :width]
    target = torch.tensor([8, 0, 3, -1, 9])
    slab = Slab(weight, None, MAPS["plain"])
    found = kernels.target_logits(hidden, slab, target)
    terms = hidden[:3].double() * weight[target[:3]].double()
    digits = torch.finfo(statistics_dtype(dtype)).eps
    error = (found.raw[:3].double() - terms.sum(1)).abs()
    assert bool((error <= 20 * digits * terms.abs().sum(1)).all())
    assert found.raw[3:].isnan().all() and found.column.tolist() == [8, 0, 3, -1, -1]
    again = kernels.target_logits(hidden, slab, target, backwards=True)
    assert torch.equal(found.raw[:3], again.raw[:3])


maps = pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)


@pytest.mark.parametrize("dtype", ELEMENTS)
@maps
@pytest.mark.parametrize("biased", [False, True])
def test_target_logits(kernels: Kernels, dtype: torch.dtype, map: LogitMap, biased: bool) -> None:
    check_target_logits(kernels.target_logits, dtype, map, biased)


@pytest.mark.parametrize("dtype", ELEMENTS)
@maps
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_settle(
    kernels: Kernels, dtype: torch.dtype, map: LogitMap, statistics: bool, offset: float
) -> None:
    check_settle(kernels.settle, dtype, map, statistics, offset)


def test_settle_alone(kernels: Kernels) -> None:
    check_settle_alone(kernels.settle)


@pytest.mark.parametrize("width", [3, 64, 5003])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_scale_rows_rounds_once_and_may_work_in_place(
    kernels: Kernels, dtype: torch.dtype, width: int
) -> None:
    rows = torch.randn(4, width + 1).to(dtype)[:, 1:]
    factor = torch.randn(4, dtype=statistics_dtype(dtype))
    expected = (rows.to(factor.dtype) * factor[:, None]).to(dtype)
    guarded = torch.full((4, width + 2), 7.0, dtype=dtype)
    kernels.scale_rows(rows, factor, guarded[:, 2:])
    assert torch.equal(guarded[:, 2:], expected) and bool((guarded[:, :2] == 7).all())
    kernels.scale_rows(rows, factor, rows)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy", "lse")])
@pytest.mark.parametrize("memory_budget", [None, 60_000])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_the_engine_computes_with_them(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    outputs: tuple[str, ...],
    memory_budget: int | None,
    needs: tuple[bool, bool],
) -> None:
    """Against plain torch; the small budget makes slabs and recomputation."""
    monkeypatch.setattr(backends, "load", lambda name: Tiled(kernels))
    hidden = torch.randn(10, 16, dtype=torch.float64, requires_grad=needs[0])
    weight = torch.randn(2100, 16, dtype=torch.float64, requires_grad=needs[1])
    target = torch.randint(2100, (10,))
    options = ScoringOptions(memory_budget=memory_budget)
    scores = linear_logprob(hidden, weight, target, outputs=outputs, options=options)
    log_p = (hidden @ weight.T).log_softmax(1)
    expected = {
        "logp": log_p.gather(1, target[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(1),
        "lse": (hidden @ weight.T).logsumexp(1),
    }
    got = [getattr(scores, name) for name in outputs]
    want = [expected[name] for name in outputs]
    torch.testing.assert_close(got, want)
    upstream = [torch.randn(10).double() for _ in outputs]
    wanted = [one for one in (hidden, weight) if one.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(got, wanted, upstream), torch.autograd.grad(want, wanted, upstream)
    )
