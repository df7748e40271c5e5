# SPDX-License-Identifier: Apache-2.0
"""Whether the compiled operators serve CUDA tensors here.

The functions of this backend are those of the cpp backend: torch's dispatcher picks the kernels by
the tile's device, see csrc/cuda/row_kernels.cuh.
"""

from __future__ import annotations

from ..._extension import cuda_ops_unavailable_reason


def unavailable_reason(device_type: str) -> str | None:
    """Why the cuda backend cannot serve tensors on ``device_type``, or None when it can."""
    if device_type != "cuda":
        return f"the cuda backend runs on CUDA tensors, got {device_type}; use backend='auto'"
    return cuda_ops_unavailable_reason()
