# SPDX-License-Identifier: Apache-2.0
"""The small kernels between products against the same in torch, in float64."""

import pytest
import torch

from fastpref.bench import launches
from fastpref.scoring.backends import glue
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.types import LogitMap
from tests.scoring.settling import MAPS, check_settle, check_settle_alone, check_target_logits

pytestmark = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on a GPU: pytest -m gpu")
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


@pytest.mark.slow
@pytest.mark.heavy
def test_a_call_launches_little() -> None:
    """The numbers that benchmarks/NOTES.md gives, of Triton and of torch."""
    found = launches.measured()
    for tier, kernels, operations in (("rows", 3, 9), ("triton", 9, 10)):
        # Without gradient the targets need no copy.
        assert found[tier]["no gradient"] == [kernels, operations - 1]
        assert found[tier]["exponentials kept"] == [kernels, operations]
    # Two products, and before and after them c and the scaled rows.
    assert found["rows"]["exponentials kept, backward"][0] == 2
    assert found["rows"]["recomputed, backward"][0] == 1
