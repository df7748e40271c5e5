# SPDX-License-Identifier: Apache-2.0
"""Products of 16-bit matrices on a GPU, added up in float32 throughout.

By torch's default cuBLAS may split the inner dimension over several blocks and add their sums in
bfloat16 or float16. The inner dimension of E W is the vocabulary: what is split there is large.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

FLAGS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")

_lock = threading.Lock()
_before: dict[str, Any] = {}
_inside = 0


@contextlib.contextmanager
def full_precision_reductions() -> Iterator[None]:
    """Reduced precision off, and afterwards as it was.

    The flags are the process's: of several threads inside, as autograd has one a device, the last
    to leave puts them back.
    """
    global _inside
    with _lock:
        if not _inside:
            _before.update({name: _setting(name) for name in FLAGS})
            for name, value in _before.items():
                _set(name, (False, *value[1:]) if isinstance(value, tuple) else False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for name, value in _before.items():
                    _set(name, value)


def _setting(name: str) -> bool | tuple[bool, ...]:
    """Whether sums may be rounded, and in newer torch whether the inner dimension may be split."""
    matmul = torch.backends.cuda.matmul
    allowed: bool | tuple[bool, ...] = getattr(matmul, name)
    if not isinstance(allowed, tuple) and not getattr(matmul, name + "_split_k", True):
        return allowed, False
    return allowed


def _set(name: str, value: bool | tuple[bool, ...]) -> None:
    setattr(torch.backends.cuda.matmul, name, value)
