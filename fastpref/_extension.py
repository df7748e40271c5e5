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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., object])

OPS_LIBRARY = Path(__file__).with_name("_ops.so")
_BUILD_INFO = Path(__file__).with_name("_build_info.json")
_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def warn_of_missing_operators() -> None:
    """Say, once a process, why what runs on the CPU is slow and what mends it. On platforms without
    compiled operators there is nothing to say."""
    reason = ops_unavailable_reason()
    if reason is not None and sys.platform.startswith(("linux", "darwin")):
        # Without a cache: a wheel without them would be taken again.
        command = "pip install --force-reinstall --no-deps --no-cache-dir"
        warnings.warn(
            f"fastpref runs on the CPU without its compiled operators, slower: {reason}. With a "
            f"C++17 compiler there, `{command} .` in fastpref's sources builds them (`-e .` for an "
            "editable installation); `fastpref env` shows what this one can do.",
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
    try:
        torch.ops.load_library(OPS_LIBRARY)
    except OSError as error:
        versions = f"built with torch {info.get('torch')}, this is torch {torch.__version__}"
        return f"{OPS_LIBRARY.name} does not load ({versions}; 2.10 or newer is needed): {error}"
    return None


def cuda_ops_unavailable_reason() -> str | None:
    """Why the operators cannot serve tensors on the current CUDA device, or None when they can."""
    reason = ops_unavailable_reason()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastpref::exp_rows_", "CUDA"):
        return f"the compiled operators have no CUDA kernels ({build_info().get('cuda')})"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU"
    return _launch_failure(torch.cuda.current_device())


def operators_serve(*tensors: Tensor | None) -> bool:
    """Whether operators that are on CPU and CUDA take these tensors, None aside: nothing traces or
    transforms them, and they are on the CPU, or on GPUs that run the kernels."""
    if not untransformed(*tensors):
        return False
    on_cpu = on_cuda = True
    for one in tensors:
        if one is not None:
            on_cpu, on_cuda = on_cpu and one.is_cpu, on_cuda and one.is_cuda
    if on_cpu:
        return ops_unavailable_reason() is None
    return on_cuda and all(one is None or _kernels_serve(one.device) for one in tensors)


def untransformed(*tensors: Tensor | None) -> bool:
    """Whether nothing traces or transforms these tensors, None aside."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    # Neither fake and distributed tensors nor tangents know operators of one's own.
    for one in tensors:
        if one is not None and (type(one) not in _PLAIN or has_tangent(one)):
            return False
    return True


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation is under way for it."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def fake_of(operator: str) -> Callable[[Function], Function]:
    """Registers the decorated function, which makes results of the operator's shapes for tracing,
    where there is such an operator."""
    if ops_unavailable_reason() is not None:
        return lambda function: function
    registered: Callable[[Function], Function] = torch.library.register_fake(operator)
    return registered


@functools.cache
def _kernels_serve(device: Any) -> bool:
    with torch.cuda.device(device):
        return cuda_ops_unavailable_reason() is None


@functools.cache
def _launch_failure(device: int) -> str | None:
    # Machine code for other GPUs, or a driver older than the runtime, shows in a launch only.
    tile = torch.zeros(1, 1, device=f"cuda:{device}", dtype=torch.float32)
    target = torch.zeros(1, dtype=torch.int64, device=tile.device)
    try:
        torch.ops.fastpref.exp_rows_(tile, target, tile[0], None, 1.0, 0.0, None, False, False)
    except RuntimeError as error:
        return str(error)
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
