# SPDX-License-Identifier: Apache-2.0
"""The environment that a report carries."""

from __future__ import annotations

import json

import pytest
import torch

from fastpref import __version__
from fastpref.bench import machine


def test_describe() -> None:
    found = machine.describe("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["fastpref"] == __version__
    assert found["threads"] == torch.get_num_threads() and found["chip"]
    assert set(machine.PEERS) <= set(found)


def test_the_headline_names_peers_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise machine.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(machine.importlib.metadata, "version", absent)
    said = machine.headline(machine.describe("cpu"))
    assert said.startswith("fastpref bench: ") and "trl not installed" in said
