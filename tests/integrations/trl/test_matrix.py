# SPDX-License-Identifier: Apache-2.0
"""The oldest TRL that is covered, in an environment of its own; ``make trl-matrix`` has all."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.trl_matrix import ROOT, VERSIONS


@pytest.mark.slow
def test_oldest_trl(tmp_path: Path) -> None:
    oldest = next(iter(VERSIONS))
    script = [sys.executable, str(ROOT / "tests" / "trl_matrix.py"), "--folder", str(tmp_path)]
    done = subprocess.run([*script, oldest], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"TRL {oldest}" in done.stdout and "passed" in done.stdout


def test_the_newest_covered_is_the_one_installed_here() -> None:
    """What ``make test`` runs."""
    trl = pytest.importorskip("trl")
    if Path(trl.__file__).is_relative_to(sys.prefix):  # not one that the matrix put in front
        assert list(VERSIONS)[-1] == trl.__version__


def test_unknown_version_is_refused() -> None:
    script = [sys.executable, str(ROOT / "tests" / "trl_matrix.py"), "0.24.0"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and "covered are 1.13.0" in done.stderr
