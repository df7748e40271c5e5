# SPDX-License-Identifier: Apache-2.0
"""Builds a wheel for each CPython from 3.10 that is installed, and says which:

python csrc/wheels.py FOLDER

``_ops.so`` is the same file in each and is compiled once; ``_C`` takes each interpreter's own
headers. All else that a build takes, torch's headers included, is that of the Python that runs
this.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = 10, 19
ABOUT = """
import json, sys, sysconfig
from pathlib import Path
print(json.dumps({
    "name": sys.implementation.name,
    "version": sys.version_info[:2],
    "tag": sys.implementation.cache_tag,
    "headers": Path(sysconfig.get_path("include"), "Python.h").exists(),
    "free-threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
}))
"""


def candidates() -> Iterator[Path]:
    """Interpreters on PATH, of pyenv, and of the manylinux images."""
    yield Path(sys.executable)
    for minor in range(OLDEST, NEWEST + 1):
        found = shutil.which(f"python3.{minor}")
        if found is not None:
            yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob("versions/*/bin/python"))
    yield from sorted(Path("/opt/python").glob("cp3*/bin/python"))


def interpreters() -> dict[str, Path]:
    """By version, the first of each."""
    found: dict[str, Path] = {}
    for path in candidates():
        done = subprocess.run([path, "-c", ABOUT], capture_output=True, text=True)
        if done.returncode != 0:  # a shim of a version that is not the one in use
            continue
        about = json.loads(done.stdout)
        fits = about["name"] == "cpython" and tuple(about["version"]) >= (3, OLDEST)
        if fits and about["headers"] and not about["free-threaded"]:
            found.setdefault(about["tag"], path)
    return found


def build(python: Path, folder: Path) -> None:
    # setuptools packs whatever is under build/lib*, also files deleted since.
    for old in (*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")):
        shutil.rmtree(old)
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    command += ["--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    subprocess.run(command, check=True, env=environment)


def main(folder: Path) -> int:
    for tag, python in interpreters().items():
        before = set(folder.glob("*.whl"))
        build(python, folder)
        for wheel in sorted(set(folder.glob("*.whl")) - before):
            print(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel}  ({tag})")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
