# SPDX-License-Identifier: Apache-2.0
"""Gathers what ``make gpu`` needs beside the sources where there is no network, and prints the size
of it all:

python benchmarks/pack.py FOLDER
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

from fastpref.bench import trl_head

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 64  # MiB
BUILT = ("fastpref/_ops.so", "fastpref/_build_info.json")
PEERS = {"Liger": "liger_kernel", "Cut Cross-Entropy": "cut_cross_entropy"}


def pack(folder: Path) -> dict[str, str]:
    """Copies TRL's file into ``folder``. Returns what is missing, with the reason."""
    missing = {
        name: f"{module} is not in {folder / 'site'}"
        for name, module in PEERS.items()
        if not (folder / "site" / module).is_dir()
    }
    source, reason = trl_head.find(), trl_head.unavailable()
    if source is None or reason is not None:
        return missing | {"TRL fused head": str(reason)}
    for old in folder.glob("trl-*.py"):
        old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, folder / f"trl-{_version(source)}.py")
    return missing


def _version(source: Path) -> str:
    """Of TRL, which a copy has in its name."""
    if source.name.startswith("trl-"):
        return source.stem.removeprefix("trl-")
    return importlib.metadata.version("trl")


def sizes(root: Path, folder: Path) -> dict[str, float]:
    """MiB of the sources, of the built files that git ignores, and of ``folder``."""
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    parts = {
        "the sources": [root / name for name in listed if name],
        **{name: [root / name] for name in BUILT},
        str(folder): list(folder.rglob("*")),
    }
    return {
        name: sum(path.stat().st_size for path in paths if path.is_file()) / (1 << 20)
        for name, paths in parts.items()
        if any(path.is_file() for path in paths)
    }


def main(folder: Path) -> int:
    missing = pack(folder)
    found = sizes(ROOT, folder)
    for name, size in (found | {"in all": sum(found.values())}).items():
        print(f"{size:8.1f} MiB  {name}")
    missing |= {name: "is not built" for name in BUILT if name not in found}
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    if sum(found.values()) > LIMIT:
        print(f"more than {LIMIT} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    sys.exit(main(Path(sys.argv[1])))
