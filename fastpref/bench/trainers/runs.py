# SPDX-License-Identifier: Apache-2.0
"""What is trained, each side in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...demo import arithmetic
from ..experiment import missing

# The first steps make buffers and compile what is compiled.
WARM = 2
MIB = 1 << 20


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
# Qwen2.5-0.5B's head, width and depth; the pairs that come with fastpref have some 45 tokens.
LARGE = {"steps": 20, "batch": 32, "layers": 24, "hidden": 896, "vocabulary": 151936}
SIDES = ("stock", "fastpref")


def trainings(sizes: Mapping[str, Any]) -> Iterator[Training]:
    """DPO both ways, and those whose stock trainers hold full logits; but for ``sizes`` of the
    usual size."""
    for method, adapters in (
        *(("dpo", True), ("dpo", False)),
        *(("orpo", False), ("simpo", False), ("tpo", False)),
    ):
        yield Training(method=method, adapters=adapters, **sizes)


def unavailable() -> str | None:
    lacking = [name for name in ("trl", "peft", "datasets") if missing(name)]
    return f"{', '.join(lacking)} not installed" if lacking else None


def measure(
    training: Training, pairs: Path | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """A row of the report: of stock TRL and of fastpref seconds a step and in the head (medians),
    and MiB at the peak above what was held before; the largest difference between the losses of a
    step. The two take their steps in turn, so that what else runs here slows down both.

    Args:
        pairs: a file; None: arithmetic.

    Raises:
        RuntimeError: with the end of its output, where a process fails; where a loss is no number.
        TimeoutError: it takes more than ``seconds``.
    """
    end = None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fastpref-bench-") as folder:
        running = {name: _start(training, pairs, name, Path(folder)) for name in SIDES}
        try:
            sides = {name: _result(one, Path(folder, name), end) for name, one in running.items()}
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    losses = list(zip(*(sides[name]["losses"] for name in SIDES), strict=True))
    if not all(math.isfinite(one) for pair in losses for one in pair):
        raise RuntimeError(f"losses are no numbers: {losses}")
    return {
        **dataclasses.asdict(training),
        "pairs": arithmetic.NAME if pairs is None else pairs.name,
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


def _start(
    training: Training, pairs: Path | None, side: str, folder: Path
) -> subprocess.Popen[str]:
    """The process of one side; its output goes to files of ``folder``."""
    turn = folder / "turn"
    turn.touch()
    sizes, threads = dataclasses.asdict(training), torch.get_num_threads()
    job = json.dumps([sizes, pairs and str(pairs), side == "fastpref", str(turn), threads])
    command = [sys.executable, "-m", "fastpref.bench.trainers.worker", job]
    with (folder / f"{side}.out").open("w") as out, (folder / f"{side}.err").open("w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, text=True)


def _result(process: subprocess.Popen[str], path: Path, end: float | None) -> dict[str, Any]:
    try:
        failed = process.wait(None if end is None else max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeoutError("cut short while it trained") from None
    if failed:
        said = path.with_suffix(".err").read_text()[-2000:]
        raise RuntimeError(f"the process that trains failed:\n{said}")
    return dict(json.loads(path.with_suffix(".out").read_text().strip().splitlines()[-1]))
