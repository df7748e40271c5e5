# SPDX-License-Identifier: Apache-2.0
"""What is trained, each side in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import demo

# The first steps make buffers and compile what is compiled.
WARM = 2
MIB = 1 << 20
DEFAULT_PAIRS = Path(demo.__file__).with_name("arithmetic.jsonl")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A Llama with random weights in float32, and how it is trained."""

    method: str  # of methods.METHODS
    adapters: bool  # LoRA on attention; else all parameters
    steps: int = 50
    batch: int = 2  # pairs
    max_length: int = 160  # tokens of prompt and response; longer pairs are left out
    layers: int = 8
    hidden: int = 512
    vocabulary: int = 32000

    @property
    def name(self) -> str:
        return f"{self.method}, {'LoRA' if self.adapters else 'all parameters'}"


QUICK = {"steps": 4, "batch": 2, "max_length": 64, "layers": 2, "hidden": 64, "vocabulary": 2048}


def trainings(quick: bool) -> Iterator[Training]:
    """DPO both ways, and those whose stock trainers hold full logits."""
    sizes: dict[str, Any] = QUICK if quick else {}
    for method, adapters in (
        *(("dpo", True), ("dpo", False)),
        *(("orpo", False), ("simpo", False), ("tpo", False)),
    ):
        yield Training(method=method, adapters=adapters, **sizes)


def measure(training: Training, pairs: Path) -> dict[str, Any]:
    """A row of the report: of stock TRL and of fastpref seconds a step and in the head (medians),
    and MiB at the peak above what was held before; the largest difference between the losses of a
    step.

    Raises:
        RuntimeError: with the end of its output, where a process fails; where a loss is no number.
    """
    sides = {name: _run(training, pairs, name == "fastpref") for name in ("stock", "fastpref")}
    losses = list(zip(sides["stock"]["losses"], sides["fastpref"]["losses"], strict=True))
    if not all(math.isfinite(one) for pair in losses for one in pair):
        raise RuntimeError(f"losses are no numbers: {losses}")
    return {
        **dataclasses.asdict(training),
        "pairs": pairs.name,
        "difference": max(abs(one - other) for one, other in losses),
        "first_loss": sides["stock"]["losses"][0],
        "last_loss": sides["stock"]["losses"][-1],
        **{name: _summary(side) for name, side in sides.items()},
    }


def _summary(side: dict[str, Any]) -> dict[str, float]:
    return {
        "step": statistics.median(side["step_seconds"][WARM:]),
        "head": statistics.median(side["head_seconds"][WARM:]),
        "peak": (side["memory_peak"] - side["memory_before"]) / MIB,
    }


def _run(training: Training, pairs: Path, on_fastpref: bool) -> dict[str, Any]:
    given = [dataclasses.asdict(training), str(pairs), on_fastpref, torch.get_num_threads()]
    done = subprocess.run(
        [sys.executable, "-m", "fastpref.bench.trainers.worker", json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process that trains failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
