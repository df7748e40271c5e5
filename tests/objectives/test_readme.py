# SPDX-License-Identifier: Apache-2.0
"""The page of the objectives: its tables are the catalogue, its examples run."""

import re
from pathlib import Path

import pytest
import torch

from fastpref import objectives
from fastpref.cli import objectives as command
from fastpref.objectives import registry
from fastpref.objectives.documentation import LETTERS

README = Path(objectives.__file__).with_name("README.md")


@pytest.fixture
def text() -> str:
    if not README.exists():
        pytest.skip("not run from a checkout")
    return README.read_text(encoding="utf-8")


def test_its_tables_are_the_catalogue(text: str) -> None:
    assert command.markdown() in text
    assert LETTERS in text


def test_its_examples_run(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)
    added = objectives.get("exponential_po", beta=0.2)
    assert added.function is names["exponential_po"]
    logps = [names[name] for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    expected = objectives.gpo(*logps, beta=0.2, function="exponential")
    torch.testing.assert_close(tuple(added(*logps)), tuple(expected))
