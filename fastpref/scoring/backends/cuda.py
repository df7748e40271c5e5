# SPDX-License-Identifier: Apache-2.0
"""Whether the compiled operators serve CUDA tensors here.

The functions of this backend are those of the cpp backend: torch's dispatcher picks the kernels by
the tile's device, see csrc/cuda/row_kernels.cuh.
"""

from __future__ import annotations

import functools

import torch

from ..._extension import build_info, ops_unavailable_reason


def unavailable_reason(device_type: str) -> str | None:
    """Why the cuda backend cannot serve tensors on ``device_type``, or None when it can."""
    if device_type != "cuda":
        return f"the cuda backend runs on CUDA tensors, got {device_type}; use backend='auto'"
    reason = ops_unavailable_reason()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastpref::exp_rows_", "CUDA"):
        return f"the compiled operators have no CUDA kernels ({build_info().get('cuda')})"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU"
    return _launch_failure(torch.cuda.current_device())


@functools.cache
def _launch_failure(device: int) -> str | None:
    # Machine code for other GPUs, or a driver older than the runtime, shows in a launch only.
    tile = torch.zeros(1, 1, device=f"cuda:{device}")
    target = torch.zeros(1, dtype=torch.int64, device=tile.device)
    try:
        torch.ops.fastpref.exp_rows_(tile, target, tile[0], None, 1.0, 0.0, False, False)
    except RuntimeError as error:
        return str(error)
    return None
