# SPDX-License-Identifier: Apache-2.0
"""One training, as a process of its own: ``-m fastpref.bench.trainers.worker JOB`` prints what it
measured as a line of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...demo import quiet, stay_offline

stay_offline()

import torch  # noqa: E402

from ...demo.data import load  # noqa: E402
from ...demo.measure import StepClock, memory, recorded  # noqa: E402
from .clock import HeadClock  # noqa: E402
from .methods import make_trainer  # noqa: E402
from .runs import Training  # noqa: E402


def train(training: Training, pairs: Path, on_fastpref: bool) -> dict[str, Any]:
    """The losses of all steps, their seconds and those of them in the head, and bytes of memory
    before and at the peak."""
    examples = load(pairs).pairs().examples
    losses: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory(prefix="fastpref-bench-") as directory:
        trainer = make_trainer(training, examples, on_fastpref, Path(directory))
        head = HeadClock()
        head.attach(trainer)
        trainer.compute_loss = recorded(trainer.compute_loss, losses)
        steps = StepClock(head)
        trainer.add_callback(steps)
        before = memory("VmRSS")
        trainer.train()
    return {
        "losses": [one.item() for one in losses],
        "step_seconds": steps.step_seconds,
        "head_seconds": steps.head_seconds,
        "memory_before": before,
        "memory_peak": memory("VmHWM"),
    }


def main(job: str) -> None:
    quiet()
    training, pairs, on_fastpref, threads = json.loads(job)
    torch.set_num_threads(threads)
    print(json.dumps(train(Training(**training), Path(pairs), on_fastpref)))


if __name__ == "__main__":
    main(sys.argv[1])
