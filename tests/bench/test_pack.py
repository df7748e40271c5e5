# SPDX-License-Identifier: Apache-2.0
"""What ``make gpu`` needs beside the sources."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastpref.bench import trl_head

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pack", ROOT / "benchmarks" / "pack.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = tmp_path / "trl-9.8.7.py"
    kernel.write_text("a = 1\n")
    monkeypatch.setenv(trl_head.VARIABLE, str(kernel))
    return module


def repository(root: Path) -> Path:
    (root / "fastpref").mkdir(parents=True)
    (root / ".gitignore").write_text("*.so\n/pack/\n")
    (root / "fastpref" / "a.py").write_bytes(b"x" * (1 << 20))
    (root / "fastpref" / "_ops.so").write_bytes(b"x" * (2 << 20))
    (root / "fastpref" / "other.so").write_bytes(b"x" * (4 << 20))
    subprocess.run(["git", "-C", str(root), "init", "-q"], check=True)
    return root


def test_sizes_and_what_is_missing(
    pack: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = repository(tmp_path / "root")
    monkeypatch.setattr(pack, "ROOT", root)
    folder = root / "pack"
    (folder / "site" / "liger_kernel").mkdir(parents=True)
    (folder / "site" / "liger_kernel" / "a.py").write_bytes(b"x" * (8 << 20))
    (folder / "trl-1.0.0.py").write_text("of an older one")
    assert pack.main(folder) == 0
    said = capsys.readouterr().out
    assert [path.name for path in folder.glob("trl-*")] == ["trl-9.8.7.py"]
    for size, name in ((1.0, "the sources"), (2.0, "fastpref/_ops.so"), (8.0, str(folder))):
        assert f"{size:8.1f} MiB  {name}" in said
    assert f"{11.0:8.1f} MiB  in all" in said
    assert "missing: Cut Cross-Entropy: cut_cross_entropy is not in" in said
    assert "missing: fastpref/_build_info.json: is not built" in said
    assert "Liger" not in said and "TRL" not in said


def test_too_much_to_carry(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pack, "ROOT", repository(tmp_path / "root"))
    monkeypatch.setattr(pack, "LIMIT", 2.5)
    assert pack.main(tmp_path / "root" / "pack") == 1


@pytest.mark.heavy
def test_this_project_fits() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "pack.py")]
    assert subprocess.run(command, capture_output=True).returncode == 1
    found = subprocess.run(["make", "-n", "gpu-pack"], cwd=ROOT, capture_output=True, text=True)
    assert "benchmarks/pack.py gpu-pack" in found.stdout
