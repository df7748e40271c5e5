# SPDX-License-Identifier: Apache-2.0
"""Measures the table by which ``backend='auto'`` chooses on a GPU (scoring/backends/choice.py)."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .gpu import Clock, candidates, step
from .implementations import Implementation
from .work import Shape, make_work

ROWS = (1024, 4096, 16384)
HEADS = ((896, 151936), (2048, 128256), (4096, 128256), (4096, 32000))
DTYPES = ("bfloat16", "float16")


def sizes() -> Iterator[tuple[str, Shape]]:
    for dtype, rows, (width, vocab) in itertools.product(DTYPES, ROWS, HEADS):
        yield dtype, Shape(8, rows // 8, width, vocab, masked=0)


def measure(
    wanted: Iterator[tuple[str, Shape]],
    capability: int,
    device: str,
    rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The entries of choice.json, said line by line as they come."""
    clock = Clock(device)
    entries = []
    for dtype, shape in wanted:
        work = make_work(shape, getattr(torch, dtype)).on(device)
        calls = {}
        for one in candidates():
            if one.name.startswith("fastpref, ") and one.unavailable is None:

                def call(one: Implementation = one) -> object:
                    return step(one, work, "frozen head")  # noqa: B023

                call()
                calls[one.name.removeprefix("fastpref, ")] = call
        times: dict[str, list[float]] = {name: [] for name in calls}
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(list(calls), len(calls)):
                times[name].append(clock(calls[name]))
        entry = {
            "capability": capability,
            "dtype": dtype,
            "rows": shape.positions,
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            "milliseconds": {
                name: round(statistics.median(values), 4) for name, values in times.items()
            },
        }
        say(f"  {entry}")
        entries.append(entry)
    return entries
