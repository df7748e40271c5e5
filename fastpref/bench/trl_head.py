# SPDX-License-Identifier: Apache-2.0
"""TRL's fused head from its one file, which needs torch, packaging and transformers alone: the
whole of TRL need not be installed where it is measured."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# A path to the file; otherwise that of the TRL that is installed.
VARIABLE = "TRL_KERNEL"
FILE = "kernels/chunked_logprob.py"
PACKAGE = "_fastpref_bench_trl"


def find() -> Path | None:
    """Where the file is."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    try:
        spec = importlib.util.find_spec("trl")
    except ValueError:  # someone put an imitation into sys.modules
        return None
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    return next((path for path in (Path(one, FILE) for one in folders) if path.is_file()), None)


def unavailable() -> str | None:
    path = find()
    if path is None:
        return f"trl is not installed, and {VARIABLE} names no copy of its {FILE}"
    if not path.is_file():
        return f"{VARIABLE} must name a copy of TRL's {FILE}, got {path}"
    missing = [one for one in ("packaging", "transformers") if not importlib.util.find_spec(one)]
    return f"TRL's head needs {' and '.join(missing)}" if missing else None


@functools.cache
def function() -> Any:
    """``ChunkedLogProbFunction``.

    Raises:
        ImportError: with the reason.
    """
    path, reason = find(), unavailable()
    if path is None or reason is not None:
        raise ImportError(reason)
    # In backward it imports its own package's helper for weights that DeepSpeed has partitioned.
    for name in (PACKAGE, f"{PACKAGE}.kernels", f"{PACKAGE}.trainer", f"{PACKAGE}.trainer.utils"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
    vars(sys.modules[name])["maybe_gather_lm_head_ctx"] = lambda *given: contextlib.nullcontext()
    name = f"{PACKAGE}.kernels.{path.stem.replace('-', '_').replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Triton finds a kernel's globals through it.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.ChunkedLogProbFunction
