# SPDX-License-Identifier: Apache-2.0
"""How time and workspace grow with N, V and H, each by itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from . import memory
from .cases import LIMIT, measure
from .experiment import Case
from .work import Shape

BASE = Shape(8, 128, 512, 8000)
# Of scored tokens, vocabulary and hidden states.
AXES: dict[str, tuple[int, ...]] = {
    "N": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "V": (8000, 16000, 32000, 64000, 128000, 256000),
    "H": (256, 512, 1024, 2048, 4096),
}
BUDGET = 64  # MiB, to which workspace is held


def shape_at(axis: str, size: int) -> Shape:
    if axis == "N":
        return replace(BASE, length=2 * size // BASE.sequences)
    return replace(BASE, **{{"V": "vocab_size", "H": "hidden_size"}[axis]: size})


def point(
    axis: str, size: int, rounds: int, device: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of forward and backward and of the bare products. Of a step that may use ``BUDGET``
    the peak memory above inputs and gradients, beside that of one copy of the scored rows (N, H)
    and of the logits (N, V), in MiB."""
    case = Case("score", "trainable head", "float32", shape_at(axis, size), device=device)
    timings = measure(case, rounds, progress, only={"fastpref"})["timings"]
    progress("memory")
    row = memory.measure(case, f"fastpref, recompute, {BUDGET} MiB", BUDGET)
    return {
        "size": size,
        "seconds": timings["fastpref"]["seconds"],
        "products": timings[LIMIT]["seconds"],
        "workspace": row["peak"] - row["gradients"],
        "rows": row["logits"] * case.shape.hidden_size / case.shape.vocab_size,
        "logits": row["logits"],
    }


def exponent(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The slope of log ``name`` over log size, by least squares."""
    points = [(math.log(row["size"]), math.log(row[name])) for row in rows]
    return statistics.linear_regression(*zip(*points, strict=True)).slope
