# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a step, measured in a process of its own, stays within its formula."""

from __future__ import annotations

import sys

import pytest

from fastpref.bench.memory import measure
from fastpref.bench.work import Shape

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BUDGET = 16 << 20


def test_recompute_stays_within_gradients_and_workspace() -> None:
    row = measure(Shape(8, 256, 64, 32000), "float32", "recompute", BUDGET)
    assert row["logits"] == 125.0
    # A few MiB for the stacks and caches of libraries; a kept or doubled tile would show.
    assert row["peak"] < row["gradients"] + row["workspace"] + 8
    assert row["peak"] < row["logits"] / 2


def test_failure_says_why() -> None:
    with pytest.raises(RuntimeError, match="schedule must be one of"):
        measure(Shape(2, 8, 8, 50), "float32", "fastest", None)
