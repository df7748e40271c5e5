# SPDX-License-Identifier: Apache-2.0
"""What the measurements ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import trl_head

PEERS = ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def describe(device: str) -> dict[str, Any]:
    """Chip, versions of everything measured, and the day."""
    chip = _gpu() if device != "cpu" else {"chip": _processor(), "threads": torch.get_num_threads()}
    return {
        **chip,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastpref": __version__,
        **{name: _version(name) for name in PEERS},
        "date": datetime.date.today().isoformat(),
    }


def headline(machine: dict[str, Any]) -> str:
    parts = [str(machine["chip"])]
    if "threads" in machine:
        parts.append(f"{machine['threads']} threads")
    names = ("torch", "fastpref", *PEERS)
    parts += [f"{name} {machine[name]}" for name in names if name in machine]
    return "fastpref bench: " + ", ".join(parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        driver = ""
    lines = driver.strip().splitlines()
    return {"chip": torch.cuda.get_device_name(), "driver": lines[0] if lines else "unknown"}


def _version(package: str) -> str:
    named = os.environ.get(trl_head.VARIABLE)
    if package == "trl" and named:
        return f"from {Path(named).name} alone"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
