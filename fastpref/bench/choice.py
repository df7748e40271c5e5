# SPDX-License-Identifier: Apache-2.0
"""Measures the table by which ``backend='auto'`` chooses on a GPU (scoring/backends/choice.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from .cases import measure
from .experiment import Case
from .work import Shape

ROWS = (1024, 4096, 16384)
HEADS = ((896, 151936), (2048, 128256), (4096, 128256), (4096, 32000))
DTYPES = ("bfloat16", "float16")
BACKENDS = ("triton", "cuda", "torch")


def cases(device: str) -> Iterator[Case]:
    for dtype, rows, (width, vocab) in itertools.product(DTYPES, ROWS, HEADS):
        shape = Shape(8, rows // 8, width, vocab, masked=0)
        yield Case("score", "frozen head", dtype, shape, device=device)


def entry(
    case: Case, capability: int, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """One of choice.json."""
    names = {f"fastpref, {backend} backend": backend for backend in BACKENDS}
    timings = measure(case, rounds, progress, only=names)["timings"]
    return {
        "capability": capability,
        "dtype": case.dtype,
        "rows": case.shape.positions,
        "hidden_size": case.shape.hidden_size,
        "vocab_size": case.shape.vocab_size,
        "milliseconds": {
            backend: round(timings[name]["seconds"] * 1e3, 4)
            for name, backend in names.items()
            if name in timings
        },
    }
