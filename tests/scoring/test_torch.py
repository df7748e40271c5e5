# SPDX-License-Identifier: Apache-2.0
"""Tiles of the plain torch backend that hold what a product seldom does, and its divergences on
rows as they were rounded to 16 bits."""

import pytest
import torch

from fastpref.scoring.backends import UpstreamGradient
from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.backends.divergences import divergence_rows
from fastpref.scoring.slab import Products
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import DTYPES, check_contract
from tests.scoring.divergences import DIVERGENCES, masked, random_tiles, value_and_gradient
from tests.scoring.test_divergence_ops import variants

INF, NAN = float("inf"), float("nan")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
low = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
maps = pytest.mark.parametrize("scale", [1.0, -1.3])


def tile_of(dtype, scale, rows=6, cols=300):
    """Logits whose targets are the columns 3, 4, ..., and these logits."""
    tile = (3 * torch.randn(rows, cols)).to(dtype)
    tile[1, 1::2], tile[2, 3] = -INF * scale, INF * scale
    target = torch.arange(rows) + 3
    own = tile.double()[range(rows), target] * scale
    return tile, target, own


@dtypes
@maps
def test_infinite_products_stay_in_their_row(dtype, scale):
    tile, target, own = tile_of(dtype, scale)
    exact = torch.promote_types(dtype, torch.float32)
    logits = tile.double() * scale
    log_p = logits.log_softmax(1)
    products = Products(tile.clone(), None, LogitMap(scale, 0.0))
    sums = torch_backend.exp_rows(products, target, own.to(exact), False, True)
    good = torch.tensor([0, 1, 3, 4, 5])
    others = logits.scatter(1, target[:, None], -INF) - own[:, None]
    expected = others.exp().sum(1)
    assert sums.sum[2].isnan()
    torch.testing.assert_close(sums.sum[good].double(), expected[good], rtol=1e-5, atol=0)
    assert torch.equal(sums.best_index[good], logits.argmax(1)[good])

    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(1)
    k = torch.rand(6, dtype=torch.float64)
    logp = log_p[range(6), target]
    zero = torch.zeros_like(k)
    scores = (own, torch.exp(logits.logsumexp(1) - own), logp, zero, None, k, entropy)
    upstream = UpstreamGradient(*(None if one is None else one.to(exact) for one in scores))
    torch_backend.logit_grad(products._replace(tile=tile), target, upstream)
    gradient = -k[:, None] * torch.where(p > 0, p * (log_p + entropy[:, None]), 0.0) * scale
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        tile[good].double(), gradient[good], rtol=tolerance, atol=max(1e-6, tolerance / 100)
    )


@dtypes
def test_of_equal_maxima_the_first_wins_beside_the_target(dtype):
    """Before it, at it, after it, and where it is elsewhere."""
    tile = torch.zeros(4, 20, dtype=dtype)
    tile[:, [5, 9]] = 2.0
    own = torch.zeros(4, dtype=torch.promote_types(dtype, torch.float32))
    target = torch.tensor([9, 5, 3, -4])
    products = Products(tile, None, LogitMap(1.0, 0.0))
    sums = torch_backend.exp_rows(products, target, own, False, True)
    assert sums.best_index.tolist() == [5, 5, 5, 5] and (sums.best == 2).all()


@dtypes
def test_nothing_but_minus_infinity(dtype):
    """No weight, in a tile that stays finite, and an anchor below every other part's."""
    tile = torch.full((2, 7), -INF, dtype=dtype)
    own = torch.tensor([0.5, -INF], dtype=torch.promote_types(dtype, torch.float32))
    products = Products(tile, None, LogitMap(1.0, 0.0))
    sums = torch_backend.exp_rows(products, torch.tensor([-1, 9]), own, True, True)
    assert (tile == 0).all() and (sums.sum == 0).all() and (sums.weighted == 0).all()
    assert sums.anchor[0] == 0.5 and sums.anchor[1] < -1e29 and (sums.offset == 0).all()
    assert sums.best_index.tolist() == [0, 0]


@low
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_of_16_bit_rows(dtype, kind):
    """Within the error contract beside plain torch on the same rounded rows."""
    torch.manual_seed(0)
    cases = {**variants(6, 1000), "masked": masked(random_tiles(5, 900), 200, 200)}
    for name, tiles in cases.items():
        if (kind, name) == ("cosine", "masked"):
            continue
        tiles = tiles.to(dtype)
        exact = value_and_gradient(tiles.to(torch.float64), kind, 0.3)
        student = tiles.student.clone()
        value = divergence_rows(*tiles._replace(student=student).products, kind, 0.3, True, "torch")
        actual = {"value": value, "gradient": student}
        check_contract(actual, value_and_gradient(tiles, kind, 0.3), exact)
        again = tiles.student.clone()
        alone = divergence_rows(*tiles._replace(student=again).products, kind, 0.3, False, "torch")
        assert torch.equal(alone, value) and torch.equal(again, tiles.student)


@dtypes
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", [NAN, INF, -INF])
def test_what_is_no_distribution_is_nan_in_its_row(dtype, kind, which, what):
    tiles = random_tiles(3, 120).to(dtype)
    tiles[which][1, 100 if what != -INF else slice(None)] = what
    value = divergence_rows(*tiles.products, kind, 0.3, True, "torch")
    assert value.isnan().tolist() == [False, True, False]
    assert tiles.student.isfinite().all(1).tolist() == [True, False, True]


@dtypes
def test_rows_that_share_no_column_or_are_zero(dtype):
    tiles = random_tiles(3, 120).to(dtype)
    tiles.student[:, 50:], tiles.teacher[:, :50] = -INF, -INF
    q = tiles.student.double().softmax(1)
    for kind, expected in (("jsd", 0.6108643), ("tv", 1.0), ("bhattacharyya", INF)):
        student = tiles.student.clone()
        value = divergence_rows(*tiles._replace(student=student).products, kind, 0.3, True, "torch")
        torch.testing.assert_close(value.double(), torch.full((3,), expected).double())
        gradient = q / 2 if kind == "bhattacharyya" else torch.zeros_like(q)
        torch.testing.assert_close(student.double(), gradient, rtol=1e-2, atol=1e-6)
    tiles = random_tiles(3, 120).to(dtype)
    tiles.student[0], tiles.teacher[1] = 0, 0
    value = divergence_rows(*tiles.products, "cosine", 0.3, True, "torch")
    assert value[:2].tolist() == [1, 1] and (tiles.student[:2] == 0).all()
