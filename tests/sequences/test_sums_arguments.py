# SPDX-License-Identifier: Apache-2.0
"""What the operator that sums over sequences refuses."""

import functools
from typing import Any

import pytest
import torch

from fastpref import _extension

pytestmark = pytest.mark.heavy


def arguments(**changed: Any) -> list[Any]:
    """Of the operator, all in order but for ``changed``."""
    given = dict.fromkeys(("token_weights", "mask", "order", "boundaries"))
    return [*({"logp": torch.zeros(2, 3)} | given | changed).values(), False]


PACKED = {"logp": torch.zeros(3), "boundaries": torch.tensor([0, 3])}
ERRORS = {
    "dtype": (arguments(logp=torch.zeros(2, 3).long()), "logp must be float64, float32, bfloat16"),
    "packed": (arguments(logp=torch.zeros(3)), r"\(N,\) with boundaries.* got 1 dimensions"),
    "padded": (arguments(boundaries=torch.tensor([0, 3])), r"\(N,\) with boundaries.* got 2 dim"),
    "columns": (arguments(logp=torch.zeros(3, 2).t()), "logp must have contiguous rows"),
    "weights": (arguments(token_weights=torch.zeros(3)), "token_weights must be shaped like logp"),
    "half weights": (
        arguments(token_weights=torch.zeros(2, 3).half()),
        "token_weights must have the dtype of logp, got another; cast both to float64",
    ),
    "float mask": (arguments(mask=torch.zeros(2, 3)), "mask must be bool"),
    "other device": (
        arguments(mask=torch.zeros(2, 3, device="meta").bool()),
        "mask must be on the device of logp; move it there first",
    ),
    "order": (arguments(order=torch.tensor([0])), "order must be .* come with boundaries"),
    "short order": (arguments(**PACKED, order=torch.tensor([0])), "order must be .* got 1 elem"),
    "strided order": (
        arguments(**PACKED, order=torch.zeros(6).long()[::2]),
        "order must be one contiguous row of int64",
    ),
    "float boundaries": (
        arguments(logp=torch.zeros(3), boundaries=torch.zeros(2)),
        "boundaries must be one contiguous row of int64",
    ),
    "no boundaries": (
        arguments(logp=torch.zeros(3), boundaries=torch.zeros(0).long()),
        r"boundaries must be \(B \+ 1,\), got no elements",
    ),
}


@functools.cache
def without_cuda_operator() -> str | None:
    if torch.version.cuda is not None:
        return "this torch has CUDA"
    if _extension.ops_unavailable_reason() is not None:
        return "fastpref/_ops.so is not built"
    built = torch._C._dispatch_has_kernel_for_dispatch_key("fastpref::sequence_sums", "CUDA")
    return None if built else "built without CUDA"


@pytest.mark.skipif(without_cuda_operator() is not None, reason=str(without_cuda_operator()))
@pytest.mark.parametrize("name", ERRORS)
def test_operator_refuses(name: str) -> None:
    given, message = ERRORS[name]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpref.sequence_sums.default.redispatch(keys, *given)
