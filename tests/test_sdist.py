# SPDX-License-Identifier: Apache-2.0
"""The source archive, unpacked elsewhere: it holds what its Makefile and its tests name, lints,
tests and builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def call(*command: str, folder: Path, **values: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | values
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not run from a clone")
    return set(call("git", "ls-files", folder=ROOT).splitlines())


@pytest.fixture(scope="module")
def unpacked(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of what is tracked, in which nothing was built."""
    clone = tmp_path_factory.mktemp("clone")
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    call(sys.executable, "setup.py", "-q", "sdist", folder=clone)
    (archive,) = (clone / "dist").glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        file.extractall(folder)
    (found,) = folder.iterdir()
    return found


def test_it_holds_what_is_tracked(tracked: set[str], unpacked: Path) -> None:
    """But for kernels/, which it has as fastpref/kernels, a folder."""
    moved = {re.sub("^kernels/", "fastpref/kernels/", name) for name in tracked}
    moved.discard("fastpref/kernels")
    assert {name for name in moved if not (unpacked / name).is_file()} == set()


def test_it_holds_what_its_makefile_names(unpacked: Path) -> None:
    makefile = (unpacked / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:\w+/)*[\w-]+\.(?:py|toml|txt)\b", makefile))
    assert {"constraints.txt", "csrc/wheels.py", "tests/trl_matrix.py"} <= named
    assert {name for name in named if not (unpacked / name).is_file()} == set()
    said = call("make", "-n", "lint", "VENV=/nowhere", folder=unpacked)
    sources = re.findall(r"csrc/\S+", said)
    assert sources and all((unpacked / name).is_file() for name in sources)


def test_it_lints(unpacked: Path) -> None:
    programs = Path(sys.prefix) / "bin"
    for name in ("ruff", "mypy", "clang-format"):
        if not (programs / name).exists():
            pytest.skip(f"{name} is not installed")
    # In this environment, as it is.
    call(
        *("make", "lint", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.dependencies"),
        folder=unpacked,
    )


def test_it_builds_and_its_tests_pass(unpacked: Path) -> None:
    """A wheel, and of each folder of tests a quick file, with the package as it is there."""
    call(sys.executable, "setup.py", "-q", "build_ext", "--inplace", folder=unpacked)
    call(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"),
        *("--no-index", "-w", "dist", "."),
        folder=unpacked,
    )
    assert list((unpacked / "dist").glob("*.whl"))
    folders = {path.parent for path in unpacked.glob("tests/**/test_*.py")}
    files = [
        min(folder.glob("test_*.py"), key=lambda path: path.stat().st_size) for folder in folders
    ]
    files += [unpacked / "tests" / f"test_{name}.py" for name in ("readme", "packaging")]
    marked = "not slow and not heavy and not gpu"
    said = call(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked),
        *(str(path.relative_to(unpacked)) for path in sorted(files)),
        folder=unpacked,
        PYTHONPATH=str(unpacked),
    )
    assert int(re.findall(r"(\d+) passed", said)[0]) > len(folders)
