# SPDX-License-Identifier: Apache-2.0
"""The small kernels between products against the same in torch, in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastpref import ScoringOptions, linear_logprob
from fastpref.scoring.backends import fused, glue
from fastpref.scoring.types import LogitMap
from tests.scoring.settling import MAPS, check_settle, check_settle_alone, check_target_logits

pytestmark = pytest.mark.skipif(not fused.INTERPRETED, reason="a GPU is here: see pytest -m gpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
maps = pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)


@dtypes
@maps
@pytest.mark.parametrize("biased", [False, True])
def test_target_logits(dtype: torch.dtype, map: LogitMap, biased: bool) -> None:
    check_target_logits(glue.target_logits, dtype, map, biased)


@dtypes
@maps
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_settle(dtype: torch.dtype, map: LogitMap, statistics: bool, offset: float) -> None:
    check_settle(glue.settle, dtype, map, statistics, offset)


def test_settle_alone() -> None:
    check_settle_alone(glue.settle)


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
