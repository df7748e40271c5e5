# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on CPU tensors, in Triton's interpreter (tests/conftest.py turns it on)."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastpref.scoring.backends import probe


def _exact(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    return handle.data.astype(np.float64)


def _dot(self, a, b, total, precision, imprecise):
    product = _exact(a) @ _exact(b) + total.data
    return TensorHandle(product.astype(np.float32), total.dtype.scalar)


@pytest.fixture(autouse=True)
def products_of_tiles(monkeypatch):
    """The interpreter multiplies the bit patterns of bfloat16 as integers, and its float32 products
    round by the position in a tile, as matrix units do not."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)


@pytest.fixture(autouse=True)
def silent_overflow():
    """An exponential that overflows or a sum of 0 is a case the kernels handle, numpy need not
    warn."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield


@pytest.fixture(autouse=True)
def nothing_stands_in(monkeypatch):
    """A kernel that is wrong must not hide behind the next tier."""
    monkeypatch.setattr(probe, "passes", lambda tier, kernel, device, check: True)
