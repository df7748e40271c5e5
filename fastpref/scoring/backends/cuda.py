# SPDX-License-Identifier: Apache-2.0
"""The compiled operators on CUDA tensors (csrc/cuda/row_kernels.cuh): torch's dispatcher picks the
kernels by the tensors' device, so that the functions are the cpp backend's."""

from __future__ import annotations

from ..._extension import cuda_ops_unavailable_reason
from .cpp import exp_rows as exp_rows
from .cpp import logit_grad as logit_grad
from .cpp import scale_rows as scale_rows
from .cpp import settle as settle
from .cpp import target_logits as target_logits
from .cpp import temporary_bytes as temporary_bytes
from .torch import gradient_factors as gradient_factors


def unavailable_reason(device_type: str) -> str | None:
    """Why the cuda backend cannot serve tensors on ``device_type``, or None when it can."""
    if device_type != "cuda":
        return f"the cuda backend runs on CUDA tensors, got {device_type}; use backend='auto'"
    return cuda_ops_unavailable_reason()
