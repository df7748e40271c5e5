# SPDX-License-Identifier: Apache-2.0
"""What ``python -m fastpref tune`` found on this very card: which tier serves a projection best.

Read once a process, so that the choice never changes in mid-run; all processes that see the same
file choose alike. Nothing here launches anything.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import torch

from . import verdict_files
from .choice import Size
from .verdict_files import Key, Verdict

# A verdict serves heads whose hidden size is within this factor of the tuned one: what an epilogue
# costs beside its product falls as H grows, and hardly depends on V. A low-rank update widens H.
NEAR = 1.25
KERNELS = Path(__file__).parents[2] / "kernels"
LAUNCHERS = tuple(
    Path(__file__).with_name(name) for name in ("triton.py", "glue.py", "rows.py", "tiled.py")
)


def verdict(device: torch.device, size: Size) -> str | None:
    """The tier for a projection of ``size`` on the CUDA device ``device``.

    "triton" where every verdict on such heads is for the fused kernels, "rows" where one is not,
    None where nothing was tuned.
    """
    if size.static:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    dtype = str(size.dtype).removeprefix("torch.")
    tiers = {
        one.tier
        for one in stored(index)
        if one.dtype == dtype
        and one.heavy == size.heavy
        and one.hidden_size <= NEAR * size.hidden_size
        and size.hidden_size <= NEAR * one.hidden_size
    }
    if not tiers:
        return None
    return "triton" if tiers == {"triton"} else "rows"


@functools.cache
def stored(index: int) -> tuple[Verdict, ...]:
    """The verdicts on the CUDA device of that index, as they are when first asked for."""
    return verdict_files.read(key_of(index))


def key_of(index: int) -> Key:
    """All that a verdict depends on: another card, driver or version is another key."""
    card = torch.cuda.get_device_properties(index)
    return {
        "kernels": _hash_of_sources(),
        "fastpref": _version("fastpref"),
        "triton": _version("triton"),
        "torch": torch.__version__,
        "driver": _driver(),
        "device": str(card.name),
        "multiprocessors": str(card.multi_processor_count),
        "capability": f"{card.major}.{card.minor}",
    }


def describe() -> str:
    """One line: where verdicts lie, and those on the current card."""
    folder = verdict_files.directory()
    if folder is None:
        return verdict_files.NO_DIRECTORY
    if not torch.cuda.is_available():
        return f"{folder}; no NVIDIA GPU here to choose for"
    found = stored(torch.cuda.current_device())
    if not found:
        return f"{folder}; none on this card: `python -m fastpref tune` makes some"
    return f"{folder}; on this card: " + ", ".join(map(summary, found))


def summary(one: Verdict) -> str:
    kind = "with statistics" if one.heavy else "plain"
    return f"{one.tier} for {one.dtype} H={one.hidden_size} {kind}"


@functools.cache
def _hash_of_sources() -> str:
    """Of the kernels and of what launches them."""
    digest = hashlib.sha256()
    for path in (*sorted(KERNELS.glob("*.py")), *LAUNCHERS):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str:
    if package == "fastpref":
        # What runs may lie elsewhere than what is installed.
        from ... import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Version of the kernel module, where Linux says it, and the newest CUDA that libcuda has."""
    try:
        module = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        module = "unknown"
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)  # absent from CPU builds
    return f"{module}, CUDA {0 if asked is None else asked()}"
