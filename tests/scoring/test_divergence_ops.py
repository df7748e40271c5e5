# SPDX-License-Identifier: Apache-2.0
"""divergence_rows_ against float64 autograd: every kind, dtype and instruction set."""

import json
import os
import subprocess
import sys

import mpmath
import pytest
import torch

from fastpref.scoring.backends.divergences import divergence_rows
from fastpref.scoring.types import LogitMap
from tests.scoring.cases import BACKENDS, DTYPES, check_contract
from tests.scoring.divergences import (
    DIVERGENCES,
    Tiles,
    masked,
    random_tiles,
    relative_error,
    value_and_gradient,
    with_bias,
)

pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
ops = torch.ops.fastpref
INF = float("inf")
BETA = 0.3
kinds = pytest.mark.parametrize("kind", DIVERGENCES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(tiles, kind, beta=BETA, write=True):
    student = tiles.student.clone()
    value = ops.divergence_rows_(
        student, *tiles[1:4], *tiles.map, DIVERGENCES.index(kind), beta, write
    )
    return {"value": value, "gradient": student}


def variants(rows, cols):
    plain = random_tiles(rows, cols)
    scaled = plain._replace(map=LogitMap(0.6, 0.0))
    return {
        "plain": plain,
        "scaled, biased": with_bias(scaled),
        "student's bias": with_bias(plain, teacher=False),
        "teacher's bias": with_bias(plain, student=False),
        "capped": with_bias(plain._replace(map=LogitMap(1.3, 5.0))),
        "large": random_tiles(rows, cols, spread=20.0),
        "close": random_tiles(rows, cols, apart=0.1),
    }


def check(tiles, kind, dtype, beta=BETA):
    tiles = tiles.to(dtype)
    exact = value_and_gradient(tiles.to(torch.float64), kind, beta)
    actual = run(tiles, kind, beta)
    if kind == "cosine" and tiles.student.shape[1] == 1:
        # In units of 1 / |s|, however small s is.
        length = tiles.to(torch.float64).logits()[0].abs()
        for one in (actual, exact):
            one["gradient"] = one["gradient"] * length
    if dtype == torch.float64:
        # The reference rounds each of its logarithms.
        torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)
    elif tiles.student.shape[1] == 1:
        torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-6, check_dtype=False)
    else:
        check_contract(actual, value_and_gradient(tiles, kind, beta), exact)


@kinds
@dtypes
@pytest.mark.parametrize("cols", [1, 7, 1000, 5000])
def test_values_and_gradients(kind, dtype, cols):
    for tiles in variants(6, cols).values():
        check(tiles, kind, dtype)


@kinds
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("cols", [7, 1000])
def test_rows_with_one_probability_of_nearly_1(kind, backend, cols):
    """The gradient there is what remains of one number beside the mean of all."""
    for seed in range(20):
        torch.manual_seed(seed)
        tiles = random_tiles(6, cols, spread=20.0).to(torch.float32)
        exact = value_and_gradient(tiles.to(torch.float64), kind, BETA)
        student = tiles.student.clone()
        products = tiles._replace(student=student).products
        value = divergence_rows(*products, kind, BETA, True, backend)
        actual, eager = (
            {"value": value, "gradient": student},
            value_and_gradient(tiles, kind, BETA),
        )
        # Where m underflows plain torch is infinite.
        finite = {name: one for name, one in eager.items() if one.isfinite().all()}
        check_contract({name: actual[name] for name in finite}, finite, exact)
        assert value.isfinite().all()


@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 0.9, 1 - 1e-3])
@dtypes
def test_mixtures(beta, dtype):
    for tiles in variants(6, 1100).values():
        check(tiles, "jsd", dtype, beta)


@kinds
@pytest.mark.parametrize("spread", [3.0, 20.0])
@pytest.mark.parametrize("apart", [1.0, 1e-1, 1e-3])
def test_digits_of_close_rows(kind, spread, apart):
    """Where plain float32 has lost some or all of them."""
    tiles = random_tiles(20, 3000, spread=spread, apart=apart).to(torch.float32)
    exact = value_and_gradient(tiles.to(torch.float64), kind, BETA)
    actual = run(tiles, kind)
    for name, value in actual.items():
        assert relative_error(value, exact[name]) <= 1e-6, name


@kinds
@dtypes
def test_equal_rows(kind, dtype):
    tiles = with_bias(random_tiles(4, 1500)).to(dtype)
    same = tiles._replace(teacher=tiles.student, teacher_bias=tiles.student_bias)
    actual = run(same, kind)
    assert (actual["value"].abs() <= (1e-13 if kind == "cosine" else 0)).all()
    assert (actual["gradient"].abs() <= (1e-9 if kind == "cosine" else 0)).all()


SOFT = DIVERGENCES[:5]


@pytest.mark.parametrize("kind", SOFT)
@dtypes
@pytest.mark.parametrize("spread", [3.0, 20.0])
def test_a_vocabulary_masked_in_both(kind, dtype, spread):
    """As if the columns were not there."""
    tiles = masked(random_tiles(5, 2500, spread=spread), 1400, 1400)
    check(tiles, kind, dtype)
    actual = run(tiles.to(dtype), kind)
    short = Tiles(tiles.student[:, :1100], tiles.teacher[:, :1100]).to(dtype)
    expected = run(short, kind)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual["value"], expected["value"], rtol=rtol, atol=0)
    assert (actual["gradient"][:, 1100:] == 0).all()


@pytest.mark.parametrize("kind", SOFT)
@dtypes
@pytest.mark.parametrize("fewer", ["student", "teacher"])
def test_a_vocabulary_masked_in_one(kind, dtype, fewer):
    """Also where the other's probability rounds to 0 there."""
    sizes = (700, 300) if fewer == "student" else (300, 700)
    tiles = masked(random_tiles(5, 1500), *sizes).to(dtype)
    tiles.student[0, 800:], tiles.teacher[0, 800:] = -300, -300
    infinite = {"student": "forward_kl", "teacher": "reverse_kl"}[fewer]
    if kind != infinite:
        check(tiles, kind, dtype)
        return
    actual = run(tiles, kind)
    assert (actual["value"] == INF).all()
    assert not actual["gradient"].isnan().any()
    if kind == "forward_kl":
        student, teacher = tiles.to(torch.float64).logits()
        expected = (student.softmax(1) - teacher.softmax(1)).to(dtype)
        torch.testing.assert_close(actual["gradient"], expected, rtol=1e-2, atol=1e-6)


@dtypes
def test_rows_that_share_no_column(dtype):
    student, teacher = random_tiles(3, 1200)[:2]
    student[:, 500:], teacher[:, :500] = -INF, -INF
    tiles = Tiles(student, teacher).to(dtype)
    q = tiles.student.double().softmax(1)
    for kind, value in (("jsd", 0.6108643), ("tv", 1.0), ("bhattacharyya", INF)):
        actual = run(tiles, kind)
        torch.testing.assert_close(actual["value"].double(), torch.full((3,), value).double())
        expected = q / 2 if kind == "bhattacharyya" else torch.zeros_like(q)
        torch.testing.assert_close(actual["gradient"].double(), expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("kind", SOFT)
def test_rows_all_but_apart(kind):
    """No product of two probabilities is a float32 number."""
    student, teacher = random_tiles(3, 1200)[:2]
    student[:, 500:] -= 200
    teacher[:, :500] -= 220
    tiles = Tiles(student, teacher).to(torch.float32)
    actual = run(tiles, kind)
    exact = value_and_gradient(tiles.to(torch.float64), kind, BETA)
    for name, value in actual.items():
        tiny = max(exact[name].abs().max(), value.abs().max()) < 1e-6
        assert tiny or relative_error(value, exact[name]) <= 4e-6


@dtypes
def test_cosine_of_zeros(dtype):
    tiles = random_tiles(3, 1200)
    tiles.student[0], tiles.teacher[1], tiles.student[2] = 0, 0, 0
    tiles.teacher[2] = 0
    actual = run(tiles.to(dtype), "cosine")
    assert (actual["value"] == 1).all() and (actual["gradient"] == 0).all()


@kinds
@dtypes
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", ["nan", "masked"])
def test_what_is_no_distribution_is_nan_in_its_row(kind, dtype, which, what):
    tiles = random_tiles(3, 1200).to(dtype)
    if what == "nan":
        tiles[which][1, 1100] = float("nan")
    else:
        tiles[which][1] = -INF
    actual = run(tiles, kind)
    assert actual["value"].isnan().tolist() == [False, True, False]
    assert actual["gradient"].isfinite().all(1).tolist() == [True, False, True]


def exact_jsd(apart, beta):
    """Between softmax(0, x) and softmax(0, -x), in 60 digits."""
    with mpmath.workdps(60):
        weight, x = mpmath.mpf(beta), mpmath.mpf(apart)
        q = [1 / (1 + mpmath.exp(-sign * x)) for sign in (-1, 1)]
        p = q[::-1]
        m = [(1 - weight) * a + weight * b for a, b in zip(q, p, strict=True)]
        terms = [
            weight * b * mpmath.log(b / c) + (1 - weight) * a * mpmath.log(a / c)
            for a, b, c in zip(q, p, m, strict=True)
        ]
        return float(sum(terms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_logarithms(dtype, beta):
    """Of mixtures of two columns, from all but equal to far apart."""
    apart = torch.logspace(-10, 1.6, 500, dtype=torch.float64).to(dtype)
    zero = torch.zeros_like(apart)
    tiles = Tiles(torch.stack([zero, apart], 1), torch.stack([zero, -apart], 1))
    value = run(tiles, "jsd", beta)["value"].double()
    exact = torch.tensor([exact_jsd(x, beta) for x in apart.tolist()], dtype=torch.float64)
    error = ((value - exact) / exact).abs().max().item()
    assert error <= 8 / min(beta, 1 - beta) * torch.finfo(dtype).eps


@kinds
@dtypes
@pytest.mark.parametrize("cols", [1, 1023, 1025])
@pytest.mark.parametrize("write", [False, True])
def test_where_the_tiles_lie(kind, dtype, cols, write):
    """They may be slices of wider ones, whose other columns are not touched, and rows do not
    depend on one another."""
    wide = random_tiles(40, cols + 20).to(dtype)
    before = wide.student.clone(), wide.teacher.clone()
    inside = Tiles(wide.student[:, 7 : 7 + cols], wide.teacher[:, 9 : 9 + cols])
    expected = [
        run(Tiles(*(z[i : i + 1] for z in inside[:2])), kind, write=write) for i in range(40)
    ]
    call = (DIVERGENCES.index(kind), BETA, write)
    value = ops.divergence_rows_(*inside[:4], *inside.map, *call)
    assert torch.equal(value, torch.cat([one["value"] for one in expected]))
    assert torch.equal(inside.student, torch.cat([one["gradient"] for one in expected]))
    assert torch.equal(wide.teacher, before[1])
    assert torch.equal(wide.student[:, :7], before[0][:, :7])
    assert torch.equal(wide.student[:, 7 + cols :], before[0][:, 7 + cols :])
    if not write:
        assert torch.equal(wide.student, before[0])


@kinds
def test_no_rows(kind):
    actual = run(Tiles(torch.zeros(0, 5), torch.zeros(0, 5)), kind)
    assert actual["value"].shape == (0,) and actual["value"].dtype == torch.float32


def arguments(dtype=torch.float32, **changes):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    call = {
        "student": torch.randn(3, 5).to(dtype),
        "teacher": torch.randn(3, 5).to(dtype),
        "student_bias": torch.randn(5, dtype=exact),
        "teacher_bias": torch.randn(5, dtype=exact),
        "scale": 1.0,
        "cap": 0.0,
        "factor": None,
        "kind": 2,
        "beta": 0.5,
        "write": True,
    }
    return {**call, **changes}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("student", torch.zeros(3), "student.*rows, cols"),
        ("student", torch.zeros(3, 5).int(), "student.*float64.*float16.*cast"),
        ("student", torch.zeros(5, 3).t(), "student.*contiguous rows.*stride"),
        ("teacher", torch.zeros(5), "teacher.*rows, 5"),
        ("teacher", torch.zeros(3, 6), "teacher.*rows, 5"),
        ("teacher", torch.zeros(2, 5), "teacher.*3 rows.*got 2"),
        ("teacher", torch.zeros(3, 5).double(), "teacher.*dtype"),
        ("teacher", torch.zeros(5, 3).t(), "teacher.*contiguous rows.*stride"),
        ("student_bias", torch.zeros(4), r"student_bias.*\(5,\)"),
        ("teacher_bias", torch.zeros(5).double(), "teacher_bias.*dtype"),
        ("factor", torch.ones(2), r"factor.*\(3,\)"),
        ("factor", torch.ones(3).double(), "factor.*dtype"),
        ("kind", 6, r"kind.*forward_kl.*cosine.*got 6"),
        ("kind", -1, r"kind.*got -1"),
        ("beta", 0.0, r"beta.*\(0, 1\).*jsd.*got 0"),
        ("beta", 1.0, r"beta.*\(0, 1\).*got 1"),
        ("beta", float("nan"), r"beta.*\(0, 1\)"),
    ],
)
def test_argument_checks(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops.divergence_rows_(**arguments(**{name: value}))


def test_beta_is_for_jsd_alone():
    given = arguments()
    for kind in (0, 1, 3, 4, 5):
        results = []
        for beta in (7.0, 0.5):
            call = {**given, "student": given["student"].clone(), "kind": kind, "beta": beta}
            results += [ops.divergence_rows_(**call), call["student"]]
        assert all(map(torch.equal, results[:2], results[2:]))


@dtypes
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(dtype, optional):
    call = arguments(dtype)
    if not optional:
        call |= {"student_bias": None, "teacher_bias": None}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.divergence_rows_.default, (), call, test_utils=checks)


_CHILD = """
import json, torch
from tests.scoring.test_divergence_ops import DTYPES, DIVERGENCES, check, variants
torch.set_num_threads(1)
torch.manual_seed(0)
problems = []
for name, tiles in variants(4, 1300).items():
    for dtype in DTYPES:
        for kind in DIVERGENCES:
            try:
                check(tiles, kind, dtype)
            except AssertionError as error:
                problems.append(f"{name} {dtype} {kind}: {error}")
print(json.dumps([torch.ops.fastpref.cpu_capability(), problems]))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_instruction_sets(capability):
    level = ["baseline", "avx2", "avx512"].index(capability)
    if ops.cpu_capability() < level:
        pytest.skip(f"this processor has no {capability}")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        env={**os.environ, "FASTPREF_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [level, []]
