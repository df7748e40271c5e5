# SPDX-License-Identifier: Apache-2.0
"""The same preference steps of TRL's DPOTrainer, under a loss of its own, with TRL's head and with
fastpref's, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .data import Example
from .recipe import Recipe
from .training import Head, Progress

HEADS: tuple[Head, ...] = ("stock", "fastpref")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process measured; times in seconds, memory in bytes."""

    losses: list[float]
    step_seconds: list[float]
    head_seconds: list[float]
    memory_before: int
    memory_peak: int

    @property
    def step(self) -> float:
        """The time of the fastest step: what else runs on the machine only ever adds to it."""
        return min(self.step_seconds)

    @property
    def head(self) -> float:
        """The least time in the head in a step, forward and backward."""
        return min(self.head_seconds)


def run(
    start: Path,
    examples: Sequence[Example],
    objective: str,
    recipe: Recipe,
    progress: Callable[[Head], Progress],
) -> dict[Head, Measured]:
    """Train from the model in `start` once with each head.

    Args:
        objective: one that TRL's DPOTrainer has a loss for.

    Raises:
        RuntimeError: with the end of its output, if a process fails.
    """
    results = {}
    with tempfile.TemporaryDirectory(prefix="fastpref-demo-") as directory:
        for head in HEADS:
            job = _job(start, examples, objective, recipe, head)
            results[head] = _run_one(job, Path(directory), progress(head))
    return results


def _job(
    start: Path, examples: Sequence[Example], objective: str, recipe: Recipe, head: Head
) -> dict[str, Any]:
    """What a process is to do, as JSON can hold it."""
    return {
        "start": str(start),
        "examples": [asdict(example) for example in examples],
        "objective": objective,
        "recipe": asdict(recipe),
        "head": head,
    }


def _run_one(job: Mapping[str, Any], directory: Path, progress: Progress) -> Measured:
    job_file, result_file = directory / "job.json", directory / "result.json"
    job_file.write_text(json.dumps(job))
    # A checkout that is not installed is importable here because of the current directory only.
    package_parent = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    with (
        (directory / "errors").open("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "fastpref.demo.worker", str(job_file), str(result_file)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                if line.startswith("step "):  # libraries may print too
                    _, step, steps, loss = line.split()
                    progress(int(step), int(steps), float(loss))
        except KeyboardInterrupt:
            process.kill()
            raise
        if process.wait() != 0:
            errors.seek(0)
            raise RuntimeError(f"the {job['head']} process failed:\n{errors.read()[-2000:]}")
    return Measured(**json.loads(result_file.read_text()))


def largest_difference(results: Mapping[Head, Measured]) -> float:
    """The largest difference between the two losses of a step."""
    pairs = zip(results["stock"].losses, results["fastpref"].losses, strict=True)
    return max(abs(stock - ours) for stock, ours in pairs)


def table(results: Mapping[Head, Measured], stock_name: str) -> list[str]:
    """The comparison as lines of text."""
    stock, ours = results["stock"], results["fastpref"]
    rows = [
        ("head, forward and backward", stock.head * 1e3, ours.head * 1e3, "ms"),
        ("whole step", stock.step * 1e3, ours.step * 1e3, "ms"),
        ("peak memory of the process", stock.memory_peak / MIB, ours.memory_peak / MIB, "MiB"),
        (
            "  above what it held before",
            (stock.memory_peak - stock.memory_before) / MIB,
            (ours.memory_peak - ours.memory_before) / MIB,
            "MiB",
        ),
    ]
    lines = [f"{'':30}{stock_name:>16}{'with fastpref':>16}{'ratio':>9}"]
    for name, before, after, unit in rows:
        ratio = f"{before / after:8.2f}x" if after > 0 else f"{'':9}"
        lines.append(f"{name:30}{before:12.1f} {unit:3}{after:12.1f} {unit:3}{ratio}")
    lines.append(f"{'largest difference in loss':30}{'':16}{largest_difference(results):16.1e}")
    return lines


def picture(results: Mapping[Head, Measured], stock_name: str, title: str, path: Path) -> None:
    """Draw both loss curves, and their difference, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stock, ours = results["stock"].losses, results["fastpref"].losses
    steps = range(1, len(stock) + 1)
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(steps, stock, color="tab:orange", linewidth=6, alpha=0.4, label=stock_name)
    above.plot(steps, ours, color="tab:blue", linewidth=1.5, marker="o", label="with fastpref")
    above.set_ylabel("loss")
    above.legend()
    differences = [abs(a - b) for a, b in zip(stock, ours, strict=True)]
    below.bar(steps, differences, color="tab:gray")
    below.set_ylabel("|difference|")
    below.set_xlabel("step")
    figure.savefig(path, dpi=120)
