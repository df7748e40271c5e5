# SPDX-License-Identifier: Apache-2.0
"""What commands check of their options before any work."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from fastpref.cli import checks
from fastpref.demo import DemoError


@pytest.mark.parametrize("deep", ["", "new", "new/deeper/still"])
def test_a_folder_is_left_as_it_was(tmp_path: Path, deep: str) -> None:
    checks.writable(tmp_path / deep)
    assert list(tmp_path.iterdir()) == []


def test_a_path_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checks.writable(Path("new/deeper"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("deep", ["taken", "taken/deeper", "new/" + 300 * "x"])
def test_a_folder_that_cannot_be(tmp_path: Path, deep: str) -> None:
    """And nothing is left of what was tried."""
    (tmp_path / "taken").touch()
    with pytest.raises(DemoError, match=r"^--out must be a folder that can be written to, got "):
        checks.writable(tmp_path / deep)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its permissions say, which for root is nothing."""

    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(DemoError, match=f"got {tmp_path}/new: Read-only file system$"):
        checks.writable(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_number_has_limits() -> None:
    for value in (1, checks.MOST):
        checks.whole("--steps", value, 1)
    for value, said in ((0, "at least 1, got 0"), (2**31, f"at most {2**31 - 1}, got {2**31}")):
        with pytest.raises(DemoError, match=f"^--steps must be {said}$"):
            checks.whole("--steps", value, 1)
