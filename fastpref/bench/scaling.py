# SPDX-License-Identifier: Apache-2.0
"""How time and workspace grow with N, V and H, each by itself."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .implementations import Loss, bare_products, implementations
from .memory import measure
from .timing import interleave
from .work import Shape, Work, make_work

BASE = Shape(8, 256, 512, 16000)
# Of scored tokens, vocabulary and hidden states.
AXES: dict[str, tuple[int, ...]] = {
    "N": (256, 512, 1024, 2048, 4096),
    "V": (8000, 16000, 32000, 64000, 128000),
    "H": (256, 512, 1024, 2048),
}
BUDGET = 64 << 20  # bytes, under which the workspace must stay flat


def shape_at(axis: str, size: int) -> Shape:
    if axis == "N":
        return replace(BASE, length=2 * size // BASE.sequences)
    return replace(BASE, **{{"V": "vocab_size", "H": "hidden_size"}[axis]: size})


def curve(
    axis: str, rounds: int, progress: Callable[[str], None], sizes: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """A row a size: seconds of forward and backward, of the bare products, and the peak memory
    above inputs and gradients (MiB) of a call that may keep ``BUDGET``."""
    rows, loss = [], implementations()[0].loss
    for size in sizes or AXES[axis]:
        progress(f"{axis}={size}")
        shape = shape_at(axis, size)
        work = make_work(shape, torch.float32)
        calls: dict[str, Callable[[], object]] = {
            "products": functools.partial(bare_products, work, True),
            "fastpref": functools.partial(_step, loss, work),
        }
        for one in calls.values():
            one()
        times = interleave(calls, "products", rounds, lambda text: None)
        memory = measure(shape, "float32", "recompute", BUDGET)
        rows.append(
            {
                "size": size,
                "seconds": times["fastpref"].seconds,
                "products": times["products"].seconds,
                "workspace": memory["peak"] - memory["gradients"],
            }
        )
    return rows


def _step(loss: Loss, work: Work) -> None:
    loss(work, *work.leaves(True)).backward()


def exponent(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The slope of log ``name`` over log size, by least squares."""
    points = [(math.log(row["size"]), math.log(max(row[name], 1e-9))) for row in rows]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def table(axis: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"  {axis:>8}{'fastpref':>12}{'products':>12}{'ratio':>8}{'workspace':>14}"]
    lines += [
        f"  {row['size']:8}{row['seconds'] * 1e3:10.1f}ms{row['products'] * 1e3:10.1f}ms"
        f"{row['seconds'] / row['products']:7.2f}x{row['workspace']:10.0f} MiB"
        for row in rows
    ]
    grows = ", ".join(f"{name} {exponent(rows, name):.2f}" for name in ("seconds", "products"))
    return "\n".join([*lines, f"  growth exponents in {axis}: {grows}"])
