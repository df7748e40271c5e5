# SPDX-License-Identifier: Apache-2.0
"""The small kernels between products against the same in torch, in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring import rows
from fastpref.scoring.backends import fused, glue, plain
from fastpref.scoring.backends.tiled import Tiled
from fastpref.scoring.rows import RowSums, TargetLogits
from fastpref.scoring.types import LogitMap

pytestmark = pytest.mark.skipif(not fused.INTERPRETED, reason="a GPU is here: see pytest -m gpu")
MAPS = {"plain": LogitMap(1.0, 0.0), "scaled": LogitMap(0.7, 0.0), "capped": LogitMap(1.3, 20.0)}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
maps = pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)


@dtypes
@maps
@pytest.mark.parametrize("biased", [False, True])
def test_target_logits(dtype: torch.dtype, map: LogitMap, biased: bool) -> None:
    hidden = torch.randn(37, 151)[:, :150].to(dtype)
    weight = torch.randn(20, 150).to(dtype)
    bias = torch.randn(20) if biased else None
    target = torch.randint(20, (37,))
    target[:4] = torch.tensor([-1, 20, 10**12, 19])
    found = glue.target_logits(hidden, weight, target, bias, map)
    wide = (hidden.double(), weight.double(), target, None if bias is None else bias.double(), map)
    expected = Tiled(plain).target_logits(*wide)
    assert torch.equal(found.column, expected.column)
    assert found.column[:4].tolist() == [-1, -1, -1, 19]
    torch.testing.assert_close(
        found[1:], expected[1:], rtol=2e-6, atol=1e-5, equal_nan=True, check_dtype=False
    )


def make_sums(count: int, statistics: bool, offset: float) -> tuple[RowSums, TargetLogits]:
    """Of rows whose target is all but certain, in the middle, and far below the others."""
    sum = torch.logspace(-37, 17, count)
    anchor = torch.linspace(-50, 50, count)
    logit = anchor.clone()
    logit[::3] += torch.linspace(-400, 3, len(logit[::3]))
    logit[-1] = -torch.inf
    best = index = None
    rest: tuple[torch.Tensor | None, ...] = (None, None, None)
    if statistics:
        best, index = torch.maximum(anchor + sum.log(), logit), torch.arange(count)
        rest = tuple(torch.rand(3, count))
    column = torch.randint(-1, 9, (count,))
    own = TargetLogits(column, logit / 1.3, logit)
    return RowSums(anchor, sum, torch.full((count,), offset), best, index, *rest), own


def widened(parts: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    return [one.double() if one is not None and one.is_floating_point() else one for one in parts]


@dtypes
@maps
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_settle(dtype: torch.dtype, map: LogitMap, statistics: bool, offset: float) -> None:
    sums, own = make_sums(301, statistics, offset)
    exps = torch.full((301, 12), 7.0, dtype=dtype)
    scores, scale = glue.settle(sums, own, exps[:, :9], map)
    exact_exps = torch.full((301, 12), 7.0, dtype=torch.float64)
    exact_sums, exact_own = RowSums(*widened(sums)), TargetLogits(*widened(own))
    exact, exact_scale = rows.settle(exact_sums, exact_own, exact_exps[:, :9], map)
    # Moved to the largest logit, a log_norm near 0 is a difference in float64.
    close = {"rtol": 1e-6, "atol": 1e-13 if statistics else 0.0, "check_dtype": False}
    for got, want in zip((*scores, scale), (*exact, exact_scale), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, **close)
    rounding = torch.finfo(dtype).eps
    # A half holds probabilities, and with an offset alone does (p - 1) / scale fit.
    fits = exact_exps.abs() < torch.finfo(dtype).max
    torch.testing.assert_close(
        exps[fits].double(), exact_exps[fits], rtol=rounding + 3e-5, atol=torch.finfo(dtype).tiny
    )


def test_settle_without_exponentials_and_without_rows() -> None:
    sums, own = make_sums(5, False, 0.0)
    scores, _ = glue.settle(sums, own, None, MAPS["plain"])
    torch.testing.assert_close(scores, rows.settle(sums, own, None, MAPS["plain"])[0])
    sums = RowSums(*torch.zeros(3, 0))
    empty = TargetLogits(*(one[:0] for one in own))
    scores, scale = glue.settle(sums, empty, None, MAPS["plain"])
    assert scale.shape == (0,) and all(one.shape == (0,) for one in scores)


def test_no_number_stays_none() -> None:
    for field in ("sum", "logit"):
        sums, own = make_sums(5, False, 0.0)
        (sums.sum if field == "sum" else own.logit)[2] = torch.nan
        scores, scale = glue.settle(sums, own, None, MAPS["plain"])
        assert scores.logp.isnan().tolist() == [False, False, True, False, False]
        assert scale.isnan()[2]


def test_an_infinite_sum_leaves_no_probability() -> None:
    sums, own = make_sums(5, False, 0.0)
    sums.sum[1], own.logit[1] = torch.inf, sums.anchor[1]
    scores, scale = glue.settle(sums, own, None, MAPS["plain"])
    assert (scores.logp[1], scale[1]) == (-torch.inf, 0.0)


# Of these none starts work on a device.
FREE = (
    *("empty", "view", "detach", "slice", "select", "unbind", "promote", "alias", "t.default"),
    *("split", "as_strided", "expand", "unsqueeze", "_local_scalar"),
    "fill_",  # of the tests: uninitialised memory holds NaN
)


class Counting(TorchDispatchMode):
    """Counts torch operations that do work."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not any(name in str(operation) for name in FREE)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [False, True])
def test_a_call_launches_little(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers that benchmarks/NOTES.md gives."""
    import triton.runtime.interpreter as interpreter

    launches = []
    launch = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.append(self)
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    hidden, weight = (torch.randn(n, 32).bfloat16().requires_grad_(kept) for n in (64, 100))
    target = torch.randint(100, (64,))
    with Counting() as operations:
        linear_logprob(hidden, weight, target, options=ScoringOptions(backend="triton"))
    assert (len(launches), operations.count) == (9, 6)
