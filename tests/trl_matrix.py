# SPDX-License-Identifier: Apache-2.0
"""``make trl-matrix``: the tests of TRL with each TRL that is covered, each in its own environment.

Each is installed into a folder that lies on the path before the environment's own, without its
dependencies, and what the environment lacks of these beside it. Prints a line a version.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = ("requests", "urllib3", "charset-normalizer", "idna", "certifi")
# Oldest first, and what each needs beside the environment.
VERSIONS: dict[str, tuple[str, ...]] = {
    "1.13.0": REQUESTS,
    "1.14.0": REQUESTS,
    "1.14.1": REQUESTS,
    "1.14.2": (),
    "1.15.0": (),
    "1.16.0": (),
}


def install(version: str, folder: Path) -> str | None:
    """What went wrong, or None."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    command += ["--disable-pip-version-check", "--target", str(folder), f"trl=={version}"]
    done = subprocess.run([*command, *VERSIONS[version]], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def run_tests(version: str, folder: Path, marks: str) -> tuple[bool, str]:
    """Whether they passed, and pytest's summary."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.version('trl'))"],
        capture_output=True,
        text=True,
        env=environment,
    ).stdout.strip()
    if found != version:
        return False, f"found TRL {found} in its place"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    command += ["--tb=short", str(ROOT / "tests" / "integrations" / "trl")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"]
    if done.returncode != 0:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    return done.returncode == 0, re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= "))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", help="otherwise all that are covered")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "trl")
    parser.add_argument("-m", dest="marks", default="not slow and not gpu", help="as pytest's")
    arguments = parser.parse_args()
    unknown = set(arguments.versions) - set(VERSIONS)
    if unknown:
        parser.error(f"covered are {', '.join(VERSIONS)}; got {', '.join(sorted(unknown))}")
    failed = False
    for version in arguments.versions or VERSIONS:
        folder, start = arguments.folder / version, time.monotonic()
        problem = install(version, folder)
        installed = time.monotonic()
        passed, said = (False, problem) if problem else run_tests(version, folder, arguments.marks)
        seconds = f"{installed - start:.0f} + {time.monotonic() - installed:.0f} s"
        print(f"TRL {version:<8} {'passed' if passed else 'FAILED':<7} {seconds:>12}  {said}")
        failed |= not passed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
