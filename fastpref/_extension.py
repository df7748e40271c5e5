# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries, and keeps the reason when one cannot be loaded.

``_ops.so`` holds the tensor operators (``torch.ops.fastpref.*``); it is no Python module. ``_C``
says what only native code can say about the build and the processor. Neither needs the other, and
scoring works without both.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

OPS_LIBRARY = Path(__file__).with_name("_ops.so")
_BUILD_INFO = Path(__file__).with_name("_build_info.json")


@functools.cache
def load() -> None:
    """Load both libraries; where operators that the platform could have are missing, warn once."""
    reason = ops_unavailable_reason()
    native_module_unavailable_reason()
    if reason is not None and sys.platform.startswith(("linux", "darwin")):
        warnings.warn(
            f"fastpref runs without its compiled operators, slower on the CPU: {reason}. "
            "`python -m fastpref env` shows what this installation can do.",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.cache
def ops_unavailable_reason() -> str | None:
    """Why the operators of ``_ops.so`` are not there, or None when they are (then loaded)."""
    info = build_info()
    if not OPS_LIBRARY.exists():
        built: str | None = info.get("reason")
        return built or f"{OPS_LIBRARY.name} is not built; run `pip install -e .` in the checkout"
    import torch

    try:
        torch.ops.load_library(OPS_LIBRARY)
    except OSError as error:
        versions = f"built with torch {info.get('torch')}, this is torch {torch.__version__}"
        return f"{OPS_LIBRARY.name} does not load ({versions}; 2.10 or newer is needed): {error}"
    return None


@functools.cache
def _native_module() -> ModuleType | str:
    """The module ``_C``, or why it cannot be imported."""
    try:
        return importlib.import_module("fastpref._C")
    except ImportError as error:
        return str(error)


def native_module() -> ModuleType | None:
    """The module ``fastpref._C``, or None where it cannot be imported."""
    module = _native_module()
    return None if isinstance(module, str) else module


def native_module_unavailable_reason() -> str | None:
    """Why ``fastpref._C`` cannot be imported, or None when it can."""
    module = _native_module()
    return module if isinstance(module, str) else None


def build_info() -> dict[str, Any]:
    """What was built and with what, as the build wrote it; empty where nothing was ever built."""
    try:
        facts: dict[str, Any] = json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts
