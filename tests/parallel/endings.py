# SPDX-License-Identifier: Apache-2.0
"""Two processes that train and must end by themselves, again and again:
``python -m tests.parallel.endings RUNS`` prints how long each run took, and says which did not end
within two minutes."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOUND = 120.0  # seconds


def run() -> tuple[float, list[str]]:
    """Seconds until both had ended, and what each printed.

    Raises:
        AssertionError: one failed, or did not end within ``BOUND``; with its stacks.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.parallel.tied"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(Path(folder) / "store")],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = []
        try:
            for rank, process in enumerate(ranks):
                try:
                    process.wait(max(0.0, began + BOUND - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.terminate()  # which prints its stacks
                    _, stacks = process.communicate()
                    raise AssertionError(
                        f"rank {rank} did not end in {BOUND:.0f} s:\n{stacks}"
                    ) from None
                out, error = process.communicate()
                assert process.returncode == 0, error
                said.append(out)
        finally:
            for process in ranks:
                process.kill()
    return time.monotonic() - began, said


def main(runs: int) -> int:
    """How many did not end well."""
    failed = 0
    for at in range(runs):
        try:
            said = f"{run()[0]:.1f} s"
        except AssertionError as error:
            said, failed = f"failed: {error}", failed + 1
        print(f"{at + 1} of {runs}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
