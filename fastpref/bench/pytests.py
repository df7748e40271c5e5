# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU, run by pytest for as long as there is time."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "tests/gpu"
# Most of the time goes into the compilation of kernels, which processes share.
PROCESSES = "8"
GRACE = 10.0  # seconds for pytest to say what failed, once it is interrupted
# With processes, and without.
LINE = re.compile(
    r"^\[gw\d+\][^A-Z]*(?P<verdict>PASSED|FAILED|ERROR|SKIPPED) (?P<name>\S.*)$"
    r"|^(?P<one>\S+::.*) (?P<said>PASSED|FAILED|ERROR|SKIPPED)\b.*$"
)

# By name, in order of value: arguments of pytest.
TESTS = {
    "scoring": ("tests/gpu/test_scoring.py", "-k", "not test_logp and not out_of_bounds"),
    "preference_loss and divergences": ("tests/gpu/test_preference.py",),
    "sequences and the pair head": ("tests/gpu/test_sequences.py", "tests/gpu/test_pair_head.py"),
    "the benchmark itself": ("tests/gpu/test_bench.py",),
    "scoring, every feature and schedule": ("tests/gpu/test_scoring.py", "-k", "test_logp"),
    "memory that runs out": ("tests/gpu/test_out_of_memory.py",),
    "squared errors of diffusion": ("tests/gpu/test_diffusion.py",),
    "accesses out of bounds": ("tests/gpu/test_scoring.py", "-k", "out_of_bounds"),
}


def unavailable() -> str | None:
    if not (ROOT / FOLDER).is_dir():
        return f"there is no {FOLDER} beside this package"
    return None if importlib.util.find_spec("pytest") else "pytest is not installed"


def command(name: str, collect: bool) -> list[str]:
    """``collect``: name the tests, run none."""
    given = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *TESTS[name]]
    if collect:
        return [*given, "--collect-only", "-q"]
    workers = ["-n", PROCESSES] if importlib.util.find_spec("xdist") else []
    return [*given, "-v", "--tb=short", *workers]


def run(given: list[str], log: Path | None, seconds: float) -> tuple[dict[str, Any], bool]:
    """Counts of what pytest said, and whether it was done within ``seconds``. Its output is added
    to ``log`` while it runs."""
    begin = time.monotonic()
    with _opened(log) as out:
        start = out.tell()
        # A session of its own: pytest's worker processes are interrupted with it.
        process = subprocess.Popen(
            given,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            # Whatever is started in the background of a shell ignores it, and passes that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            code: int | None = process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            code = None
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(start)
        row = counted(out.read().decode(errors="replace"))
    if code not in (0, 1, None):
        row["reason"] = f"pytest ended with {code}: {row.pop('last')}"
    row.pop("last", None)
    return row | {"exit": code, "seconds": time.monotonic() - begin}, code is not None


def _opened(log: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile() if log is None else log.open("ab+")


def counted(output: str) -> dict[str, Any]:
    """Of the lines of ``pytest -v``: how many passed and were skipped, and which failed."""
    found: dict[str, list[str]] = {"PASSED": [], "SKIPPED": [], "FAILED": [], "ERROR": []}
    lines = output.splitlines()
    for line in lines:
        match = LINE.match(line)
        if match:
            found[match["verdict"] or match["said"]].append((match["name"] or match["one"]).strip())
    return {
        "passed": len(found["PASSED"]),
        "skipped": len(found["SKIPPED"]),
        "failed": list(dict.fromkeys(found["FAILED"] + found["ERROR"])),
        "last": next((line for line in reversed(lines) if line.strip()), "no output"),
    }
