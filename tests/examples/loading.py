# SPDX-License-Identifier: Apache-2.0
"""The examples as modules, and what they print."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> Any:
    """The module; skips where a library that it imports is missing."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "fastpref").startswith("fastpref"):
            raise
        pytest.skip(f"{error.name} is not installed")
    return module


def printed(text: str, name: str) -> list[float]:
    """Of a quantity, step after step."""
    return [float(value) for value in re.findall(rf"{name} ([-+.\d]+)", text)]
