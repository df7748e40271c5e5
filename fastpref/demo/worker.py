# SPDX-License-Identifier: Apache-2.0
"""One side of the comparison, run as a process of its own: ``-m fastpref.demo.worker JOB RESULT``.

Trains as the job says and writes the loss, the head's time and the time of every step, and the
peak memory of the process. Prints a line a step: ``step``, its number, how many, and the loss.
"""

import json
import sys
from pathlib import Path
from typing import Any

from . import quiet, stay_offline

stay_offline()

from .data import Example  # noqa: E402
from .measure import measured  # noqa: E402
from .model import load_model  # noqa: E402
from .objective import find  # noqa: E402
from .recipe import Recipe  # noqa: E402
from .training import preference_trainer, scored_by  # noqa: E402


def train(job: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Do the steps of a job (see `compare.run`) and return what was measured."""
    recipe = Recipe(**job["recipe"])
    model, tokenizer = load_model(Path(job["start"]))
    reference, _ = load_model(Path(job["start"]))
    with scored_by(job["head"]):
        trainer = preference_trainer(
            model,
            reference,
            tokenizer,
            [Example(**example) for example in job["examples"]],
            find(job["objective"]),
            recipe,
            directory=directory,
            progress=lambda step, steps, loss: print("step", step, steps, loss, flush=True),
        )
        return measured(trainer)


def main(job_file: str, result_file: str) -> None:
    """Read a job, do it, write the result."""
    quiet()
    result = Path(result_file)
    found = train(json.loads(Path(job_file).read_text()), result.with_suffix(""))
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
