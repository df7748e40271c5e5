# SPDX-License-Identifier: Apache-2.0
"""Schemas, fakes and autograd registration of the compiled operators."""

import pytest
import torch

from tests.scoring.cases import BACKENDS, DTYPES
from tests.scoring.operator_calls import (
    EXACT,
    SETTLED,
    exact_of,
    exp_rows_arguments,
    gradient_rows_arguments,
    logit_grad_arguments,
    patterns,
    score_rows_arguments,
    spread_rows_arguments,
)

pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
ops = torch.ops.fastpref
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_rows_under_a_gradient(dtype):
    for count in (5, 9):
        given = gradient_rows_arguments(dtype=dtype, count=count)
        torch.library.opcheck(ops.gradient_rows.default, (), given, test_utils=CHECKS[:2])
    given = spread_rows_arguments(dtype=dtype)
    torch.library.opcheck(ops.spread_rows_.default, (), given, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_opcheck_vectors(dtype):
    gradient, scale = torch.randn(2, 9, dtype=dtype)
    # Their count is an int, which no fake of a tracer can stand for.
    without_fakes = CHECKS[:2]
    given = gradient, scale, 0.7
    torch.library.opcheck(ops.gradient_factors.default, given, test_utils=CHECKS)
    for there in patterns(9).values():
        given = (torch.where(there, gradient, 0.0),)
        torch.library.opcheck(ops.nonzero_places.default, given, test_utils=without_fakes)
        given = torch.where(there, 3, -100), -100
        torch.library.opcheck(ops.scored_places.default, given, test_utils=without_fakes)
