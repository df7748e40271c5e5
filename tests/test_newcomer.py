# SPDX-License-Identifier: Apache-2.0
"""Someone new: a fresh environment, the README's install line, every block, every recipe.

Fetches what the install line does. Wall times are printed as they pass:

pytest -m slow -s tests/test_newcomer.py
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import time
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OVER = ("__pycache__", "*.so", "_build_info.json", ".git", ".venv*", "build", "dist")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Newcomer:
    checkout: Path
    elsewhere: Path
    environment: Mapping[str, str]

    def run(self, name: str, command: list[str], folder: Path) -> str:
        """Its standard output."""
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, cwd=folder, env=self.environment, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{time.monotonic() - begin:7.1f} s, {busy:6.1f} s of CPU  {name}", flush=True)
        assert done.returncode == 0, f"{name}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    folder = tmp_path_factory.mktemp("newcomer")
    ignore = shutil.ignore_patterns(*LEFT_OVER)
    checkout = shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignore)
    venv.create(folder / "venv", symlinks=True, with_pip=True)
    environment = {name: value for name, value in os.environ.items() if "FASTPREF" not in name}
    environment.pop("PYTHONPATH", None)
    environment |= {"PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    # No recipe and no block needs a network.
    environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path_factory.mktemp("scratch"))}
    (folder / "elsewhere").mkdir()
    yield Newcomer(checkout, folder / "elsewhere", environment)
    shutil.rmtree(folder)


def test_the_first_half_hour(newcomer: Newcomer) -> None:
    readme = (newcomer.checkout / "README.md").read_text(encoding="utf-8")
    install = blocks(readme.split("## Install")[1], "")[0].splitlines()
    commands = [line.partition("#")[0].strip() for line in install]
    assert commands == ['pip install ".[trl]"', "fastpref env"]
    print()
    for command in commands:
        said = newcomer.run(command, ["sh", "-c", command], newcomer.checkout)
    assert "self-check: OK" in said
    # Built with its operators, which the environment of the tests has too or not.
    assert re.search(r"cpp +available", said) or shutil.which("g++") is None
    for place, block in enumerate(blocks(readme, "python")):
        newcomer.run(f"README, block {place}", ["python", "-c", block], newcomer.elsewhere)
    recipes = (newcomer.checkout / "examples" / "README.md").read_text(encoding="utf-8")
    (beside,) = re.findall(r"`(pip install [\w -]+)`", recipes)
    newcomer.run(beside, beside.split(), newcomer.checkout)
    rows = re.findall(r"^\| .* \| \[(\w+\.py)\].* \| (.*) \|$", recipes, re.MULTILINE)
    assert {name for name, _ in rows} == {
        path.name for path in (newcomer.checkout / "examples").glob("*.py")
    }
    for name, how in rows:
        command = next(iter(re.findall(r"`(\w+ [^`]*examples/[^`]*)`", how)), None)
        words = (command or f"python examples/{name}").split()
        assert words[-1] == f"examples/{name}"
        newcomer.run(" ".join(words), words, newcomer.checkout)
