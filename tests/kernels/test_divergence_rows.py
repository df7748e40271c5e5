# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that compare two models' rows, against float64 autograd."""

import pytest
import torch

from fastpref import ScoringOptions, linear_divergence
from fastpref.scoring.backends import divergence_launch
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import check_contract
from tests.scoring.divergences import (
    DIVERGENCES,
    Tiles,
    masked,
    random_tiles,
    relative_error,
    value_and_gradient,
    with_bias,
)

pytestmark = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on a GPU: pytest -m gpu")
BETA = 0.3
INF = float("inf")
kinds = pytest.mark.parametrize("kind", DIVERGENCES)
soft = pytest.mark.parametrize("kind", DIVERGENCES[:5])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def run(tiles, kind, beta=BETA, write=True):
    student = tiles.student.clone()
    products = tiles._replace(student=student).products
    value = divergence_launch.divergence_rows(*products, DIVERGENCES.index(kind), beta, write)
    return {"value": value, "gradient": student}


def check(tiles, kind, dtype):
    tiles = tiles.to(dtype)
    exact = value_and_gradient(tiles.to(torch.float64), kind, BETA)
    actual = run(tiles, kind)
    if relative_error(actual["gradient"], exact["gradient"]) <= 1e-6:
        del actual["gradient"]
    check_contract(actual, value_and_gradient(tiles, kind, BETA), exact)


@pytest.mark.heavy
@kinds
@dtypes
def test_values_and_gradients(kind, dtype):
    for cols in (7, 2500):
        plain = random_tiles(3, cols)
        check(plain, kind, dtype)
        check(random_tiles(3, cols, spread=15.0), kind, dtype)
        check(with_bias(plain._replace(map=LogitMap(1.3, 5.0))), kind, dtype)


@pytest.mark.heavy
@dtypes
def test_each_row_its_own_map(dtype):
    """Of the one divergence that is asked for so."""
    factor, tiles = torch.tensor([0.4, 1.0, 2.2]), random_tiles(3, 2500)
    for map in (LogitMap(0.8, 0.0, factor), LogitMap(1.3, 5.0, factor)):
        check(with_bias(tiles._replace(map=map)), "forward_kl", dtype)
        student, teacher = tiles.to(dtype)._replace(map=map).products
        assert divergence_launch.serves("rows", student, teacher, 0, True)
        assert not divergence_launch.serves("rows", student, teacher, 1, True)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "kind", ["reverse_kl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("jsd", "tv"))]
)
def test_rows_with_one_probability_of_nearly_1(kind):
    """The gradient there is what remains of one number beside the mean of all."""
    for seed in range(8):
        torch.manual_seed(seed)
        tiles = random_tiles(6, 7, spread=20.0).to(torch.float32)
        exact, eager = (
            {"gradient": value_and_gradient(tiles.to(one), kind, BETA)["gradient"]}
            for one in (torch.float64, torch.float32)
        )
        check_contract({"gradient": run(tiles, kind)["gradient"]}, eager, exact)


@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("apart", [0.1, 1e-3])
def test_digits_of_close_rows(kind, apart):
    tiles = random_tiles(4, 3000, apart=apart).to(torch.float32)
    exact = value_and_gradient(tiles.to(torch.float64), kind, BETA)
    for name, value in run(tiles, kind).items():
        assert relative_error(value, exact[name]) <= 2e-6, name


@pytest.mark.heavy
@soft
@dtypes
def test_equal_rows(kind, dtype):
    student = random_tiles(2, 2500).student.to(dtype)
    actual = run(Tiles(student, student.clone()), kind)
    assert (actual["value"] == 0).all() and (actual["gradient"] == 0).all()


@pytest.mark.heavy
@soft
@dtypes
@pytest.mark.parametrize("sizes", [(900, 900), (900, 300), (300, 900)])
def test_masked_vocabularies(kind, dtype, sizes):
    tiles = masked(random_tiles(2, 2500), *sizes).to(dtype)
    # Also where the other's probability rounds to 0.
    tiles.student[0, 1600:], tiles.teacher[0, 1600:] = -300, -300
    infinite = {"forward_kl": sizes[0] > sizes[1], "reverse_kl": sizes[0] < sizes[1]}
    if infinite.get(kind):
        actual = run(tiles, kind)
        assert (actual["value"] == INF).all() and not actual["gradient"].isnan().any()
    else:
        check(tiles, kind, dtype)


@pytest.mark.heavy
@soft
def test_rows_that_share_no_column(kind):
    student, teacher = random_tiles(2, 2500)[:2]
    student[:, 500:], teacher[:, :500] = -INF, -INF
    actual = run(Tiles(student, teacher).to(torch.float32), kind)
    values = {"jsd": 0.6108643, "tv": 1.0}
    expected = torch.full((2,), values.get(kind, INF))
    torch.testing.assert_close(actual["value"], expected)
    assert not actual["gradient"].isnan().any()


@pytest.mark.heavy
def test_cosine_of_zeros():
    tiles = random_tiles(3, 2500)
    tiles.student[0], tiles.teacher[1], tiles.student[2], tiles.teacher[2] = 0, 0, 0, 0
    actual = run(tiles.to(torch.float32), "cosine")
    assert (actual["value"] == 1).all() and (actual["gradient"] == 0).all()


@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("what", ["nan", "masked"])
def test_what_is_no_distribution_is_nan_in_its_row(kind, what):
    tiles = random_tiles(3, 2500).to(torch.float32)
    if what == "nan":
        tiles.teacher[1, 2200] = float("nan")
    else:
        tiles.teacher[1] = -INF
    actual = run(tiles, kind)
    assert actual["value"].isnan().tolist() == [False, True, False]
    assert actual["gradient"].isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.heavy
@kinds
@pytest.mark.parametrize("write", [False, True])
def test_where_the_tiles_lie(kind, write):
    wide = random_tiles(3, 1220).to(torch.float32)
    before = wide.student.clone()
    inside = Tiles(wide.student[:, 7:1207], wide.teacher[:, 9:1209])
    expected = run(Tiles(*(one.contiguous() for one in inside[:2])), kind, write=write)
    value = divergence_launch.divergence_rows(
        *inside.products, DIVERGENCES.index(kind), BETA, write
    )
    assert torch.equal(value, expected["value"])
    assert torch.equal(inside.student, expected["gradient"])
    assert torch.equal(wide.student[:, :7], before[:, :7])
    assert torch.equal(wide.student[:, 1207:], before[:, 1207:])
    if not write:
        assert torch.equal(wide.student, before)


def test_no_rows_and_no_such_kind():
    empty = Tiles(torch.zeros(0, 5), torch.zeros(0, 5))
    assert run(empty, "tv")["value"].shape == (0,)
    assert run(Tiles(torch.zeros(2, 0), torch.zeros(2, 0)), "tv")["value"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"kind.*got 6"):
        divergence_launch.divergence_rows(*empty.products, 6, BETA, True)


def test_linear_divergence_runs_on_it():
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    teacher = torch.randn(5, 8), torch.randn(44, 8)
    found = []
    for backend in ("triton", "torch"):
        options = ScoringOptions(backend=backend)
        value = linear_divergence(hidden, weight, *teacher, divergence="jsd", options=options)
        found.append([value, *torch.autograd.grad(value.sum(), (hidden, weight))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
