# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: in every round each candidate runs once, so that drift hits all alike, in an
order of its own, so that nobody always runs on the caches and pages that the same one left."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    seconds: float  # median
    ratio: float  # median over rounds of the candidate's time over the limit's in that round
    low: float  # 20th percentile of that ratio
    high: float  # 80th percentile


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    limit: str,
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, Timing]:
    """Time ``candidates`` against the one named ``limit``; each has run once before."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for name in order.sample(list(candidates), len(candidates)):
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    result = {}
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times[limit], strict=True))
        result[name] = Timing(
            statistics.median(values),
            statistics.median(ratios),
            ratios[len(ratios) // 5],
            ratios[-1 - len(ratios) // 5],
        )
    return result
