# SPDX-License-Identifier: Apache-2.0
"""Clocks, and interleaved timing: in every round each candidate runs once, so that drift hits all
alike, in an order of its own, so that nobody always runs on the caches and pages that the same one
left."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MEBIBYTE = 1 << 20
WARM_SECONDS = 0.5
AHEAD_CYCLES = 10_000_000  # some 5 ms
# Candidates slower than so many times the limit run in every second round.
SLOW = 3.0


@dataclass(frozen=True)
class Timing:
    seconds: float  # median
    ratio: float  # median over rounds of the candidate's time over the limit's in that round
    low: float  # 20th percentile of that ratio
    high: float  # 80th percentile


class Clock:
    """Seconds of a call: by the wall on a CPU; by events on a GPU, whose second-level cache is
    overwritten first."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        if self.cuda:
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self.cache = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self.cache.zero_()
        # The host runs ahead, as it does in training: the device must not wait for it between the
        # events.
        torch.cuda._sleep(AHEAD_CYCLES)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def warm(self, call: Callable[[], object]) -> None:
        """Run ``call`` until a GPU's clocks have risen."""
        end = time.perf_counter() + WARM_SECONDS
        while self.cuda and time.perf_counter() < end:
            call()
            torch.cuda.synchronize()

    def peak(self, call: Callable[[], object]) -> float | None:
        """MiB asked for at most during the call, above what was before. None on a CPU, where it
        takes a process of its own (memory.py)."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # Not what was allocated: blocks are up to a MiB larger than what was asked for.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        return float(peak - before) / MEBIBYTE


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    limit: str,
    rounds: int,
    clock: Clock,
    progress: Callable[[str], None],
) -> dict[str, Timing]:
    """Time ``candidates`` against the one named ``limit``; each has run once before."""
    rows: list[dict[str, float]] = []
    slow: set[str] = set()
    order = random.Random(0)
    clock.warm(candidates[limit])
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        row = {}
        for name in order.sample(list(candidates), len(candidates)):
            if name not in slow or number % 2 == 0:
                row[name] = clock(candidates[name])
        rows.append(row)
        if number == 0:
            slow = {name for name, seconds in row.items() if seconds > SLOW * row[limit]}
    pairs = {name: [(row[name], row[limit]) for row in rows if name in row] for name in candidates}
    return {name: _timing(found) for name, found in pairs.items()}


def _timing(pairs: list[tuple[float, float]]) -> Timing:
    """Of times of a candidate and of the limit in the same round."""
    ratios = sorted(own / limit for own, limit in pairs)
    edge = len(ratios) // 5
    return Timing(
        statistics.median(own for own, _ in pairs),
        statistics.median(ratios),
        ratios[edge],
        ratios[-1 - edge],
    )
