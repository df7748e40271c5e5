# SPDX-License-Identifier: Apache-2.0
"""One training, as a process of its own: ``-m fastpref.bench.trainers.worker JOB`` prints what it
measured as a line of JSON."""

from __future__ import annotations

import fcntl
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...demo import quiet, stay_offline

stay_offline()

import torch  # noqa: E402

from ...demo.data import load  # noqa: E402
from ...demo.measure import measured  # noqa: E402
from .methods import make_trainer  # noqa: E402
from .runs import Training  # noqa: E402


class Turn:
    """Held by one of the processes that share its file, while the others wait."""

    def __init__(self, path: Path) -> None:
        self.file = path.open()

    def __enter__(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self.file, fcntl.LOCK_UN)


def train(training: Training, pairs: Path | None, on_fastpref: bool, turn: Path) -> dict[str, Any]:
    """What ``demo.measure.measured`` returns."""
    examples = load(pairs).pairs().examples
    with tempfile.TemporaryDirectory(prefix="fastpref-bench-") as directory:
        trainer = make_trainer(training, examples, on_fastpref, Path(directory))
        return measured(trainer, Turn(turn))


def main(job: str) -> None:
    quiet()
    training, pairs, on_fastpref, turn, threads = json.loads(job)
    torch.set_num_threads(threads)
    print(json.dumps(train(Training(**training), pairs and Path(pairs), on_fastpref, Path(turn))))


if __name__ == "__main__":
    main(sys.argv[1])
