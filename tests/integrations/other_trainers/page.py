# SPDX-License-Identifier: Apache-2.0
"""The lines that the page of other trainers tells their users to write."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpref
from fastpref import integrations

PATH = Path(integrations.__file__).with_name("README.md")


def page() -> str:
    if not PATH.exists():
        pytest.skip("not run from a checkout")
    return PATH.read_text(encoding="utf-8")


def sections() -> dict[str, list[str]]:
    """Title -> its blocks of Python."""
    titles_and_texts = re.split(r"^## (.*)$", page(), flags=re.MULTILINE)[1:]
    pairs = zip(titles_and_texts[::2], titles_and_texts[1::2], strict=True)
    return {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in pairs}


def run_lines(section: str, block: int, /, **names: Any) -> dict[str, Any]:
    """Run a block of a section, among the names that are around it in the trainer; returns all
    names afterwards."""
    names = {"fastpref": fastpref, "torch": torch, **names}
    exec(sections()[section][block], names)
    return names
