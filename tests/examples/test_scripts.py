# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a script, and examples/README.md names it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.loading import FOLDER

SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))


def test_readme_lists_them() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"({name})" not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    for library in ("transformers", "accelerate", "datasets", "peft", "trl"):
        pytest.importorskip(library)
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
