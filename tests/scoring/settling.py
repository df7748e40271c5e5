# SPDX-License-Identifier: Apache-2.0
"""What every kernel between the products has to meet: target logits and row scores against the same
in torch, in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref.scoring.backends import torch as torch_backend
from fastpref.scoring.rows import TargetLogits
from fastpref.scoring.slab import Slab
from fastpref.scoring.statistics import RowSums
from fastpref.scoring.types import LogitMap, statistics_dtype

MAPS = {"plain": LogitMap(1.0, 0.0), "scaled": LogitMap(0.7, 0.0), "capped": LogitMap(1.3, 20.0)}


def check_target_logits(
    target_logits: Callable[..., TargetLogits], dtype: torch.dtype, map: LogitMap, biased: bool
) -> None:
    """Rows of both matrices begin at any address."""
    exact = statistics_dtype(dtype)
    hidden = torch.randn(37, 153)[:, 1:151].to(dtype)
    weight = torch.randn(20, 155).to(dtype)[:, 3:153]
    bias = torch.randn(20, dtype=exact) if biased else None
    target = torch.randint(20, (37,))
    target[:4] = torch.tensor([-1, 20, 10**12, 19])
    found = target_logits(hidden, Slab(weight, bias, map), target)
    wide = Slab(weight.double(), None if bias is None else bias.double(), map)
    expected = torch_backend.target_logits(hidden.double(), wide, target)
    assert torch.equal(found.column, expected.column)
    assert found.column[:4].tolist() == [-1, -1, -1, 19]
    assert found.raw.dtype == found.logit.dtype == exact
    torch.testing.assert_close(
        found[1:], expected[1:], rtol=2e-6, atol=1e-5, equal_nan=True, check_dtype=False
    )


def make_sums(
    count: int, statistics: bool, offset: float, exact: torch.dtype = torch.float32
) -> tuple[RowSums, TargetLogits]:
    """Of rows whose target is all but certain, in the middle, and far below the others."""
    sum = torch.logspace(-37, 17, count, dtype=exact)
    anchor = torch.linspace(-50, 50, count, dtype=exact)
    logit = anchor.clone()
    logit[::3] += torch.linspace(-400, 3, len(logit[::3]), dtype=exact)
    logit[-1] = -torch.inf
    best = index = None
    rest: tuple[Tensor | None, ...] = (None, None, None)
    if statistics:
        best, index = torch.maximum(anchor + sum.log(), logit), torch.arange(count)
        rest = tuple(torch.rand(3, count, dtype=exact))
    column = torch.randint(-1, 9, (count,))
    own = TargetLogits(column, logit / 1.3, logit)
    return RowSums(anchor, sum, torch.full_like(sum, offset), best, index, *rest), own


def widened(parts: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [one.double() if one is not None and one.is_floating_point() else one for one in parts]


def check_settle(
    settle: Callable[..., Any], dtype: torch.dtype, map: LogitMap, statistics: bool, offset: float
) -> None:
    exact_dtype = statistics_dtype(dtype)
    sums, own = make_sums(301, statistics, offset, exact_dtype)
    exps = torch.full((301, 12), 7.0, dtype=dtype)
    scores, scale = settle(sums, own, exps[:, :9], map)
    exact_exps = torch.full((301, 12), 7.0, dtype=torch.float64)
    exact_sums, exact_own = RowSums(*widened(sums)), TargetLogits(*widened(own))
    exact, exact_scale = torch_backend.settle(exact_sums, exact_own, exact_exps[:, :9], map)
    # Moved to the largest logit, a log_norm near 0 is a difference in float64.
    close = {"rtol": 1e-6, "atol": 1e-13 if statistics else 0.0, "check_dtype": False}
    for got, want in zip((*scores, scale), (*exact, exact_scale), strict=True):
        assert got.dtype == exact_dtype
        torch.testing.assert_close(got, want, **close)
    rounding = torch.finfo(dtype).eps
    # A half holds probabilities, and with an offset alone does (p - 1) / scale fit.
    fits = exact_exps.abs() < torch.finfo(dtype).max
    torch.testing.assert_close(
        exps[fits].double(), exact_exps[fits], rtol=rounding + 3e-5, atol=torch.finfo(dtype).tiny
    )


def check_settle_alone(settle: Callable[..., Any]) -> None:
    """Without exponentials, without rows, with numbers that are none and sums without end."""
    sums, own = make_sums(5, False, 0.0)
    scores, _ = settle(sums, own, None, MAPS["plain"])
    torch.testing.assert_close(scores, torch_backend.settle(sums, own, None, MAPS["plain"])[0])
    empty = RowSums(*torch.zeros(3, 0)), TargetLogits(*(one[:0] for one in own))
    scores, scale = settle(*empty, None, MAPS["plain"])
    assert scale.shape == (0,) and all(one.shape == (0,) for one in scores)
    for field in ("sum", "logit"):
        sums, own = make_sums(5, False, 0.0)
        (sums.sum if field == "sum" else own.logit)[2] = torch.nan
        scores, scale = settle(sums, own, None, MAPS["plain"])
        assert scores.logp.isnan().tolist() == [False, False, True, False, False]
        assert scale.isnan()[2]
    sums, own = make_sums(5, False, 0.0)
    sums.sum[1], own.logit[1] = torch.inf, sums.anchor[1]
    scores, scale = settle(sums, own, None, MAPS["plain"])
    assert (scores.logp[1], scale[1]) == (-torch.inf, 0.0)
