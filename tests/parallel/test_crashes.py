# SPDX-License-Identifier: Apache-2.0
"""A rank that raises, or is killed in mid-step, and its peer, which must not wait for ever."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "how", ["raises", *(pytest.param(one, marks=pytest.mark.slow) for one in ("killed", "nan"))]
)
def test_its_peer_raises(how: str, tmp_path: Path) -> None:
    """Within a minute of the step's beginning: its own process group notices, none of fastpref's
    collectives does."""
    command = [sys.executable, "-m", "tests.parallel.crashing"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), how],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    (out, error), (other, other_error) = said
    assert "a step" in out and "a step" in other, other_error
    assert ranks[1].returncode == (-signal.SIGKILL if how == "killed" else 1), other_error
    wanted = {"raises": "target must be int64", "nan": "returned nan values", "killed": ""}
    assert wanted[how] in other_error
    assert ranks[0].returncode == 1 and "RuntimeError" in error
    (seconds,) = re.findall(r"after ([\d.]+) s", out)
    assert float(seconds) < 60
