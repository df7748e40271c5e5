# SPDX-License-Identifier: Apache-2.0
"""What ``make gpu`` measures, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .experiment import MODES, Case
from .work import MODELS, Shape

# Cases that have not begun by then are left out, and listed.
SECONDS = 420
HEADS = ("llama-3-8b", "llama-3.2-1b", "qwen2.5-0.5b")
TOKENS = (2048, 4096, 8192)  # of the memory curve


def cases() -> Iterator[Case]:
    """Packed rows of real heads first; then losses in one call on padded batches."""
    for name in HEADS:
        for mode in reversed(MODES):
            yield Case("score", mode, "bfloat16", _shape(name, 0.0), device="cuda")
    for what in ("dpo", "divergence", "grpo", "heads", "step", "kto", "simpo", "orpo"):
        yield Case(what, "trainable head", "bfloat16", _shape(HEADS[1], 0.5), device="cuda")
    random = Case("score", "trainable head", "bfloat16", _shape(HEADS[1], 0.0), device="cuda")
    yield replace(random, logits="random")


def memory_cases() -> Iterator[Case]:
    for scored in TOKENS:
        shape = replace(_shape(HEADS[1], 0.0), length=scored // 8)
        yield Case("score", "trainable head", "bfloat16", shape, device="cuda")


def _shape(model: str, masked: float) -> Shape:
    """8192 scored tokens."""
    width, vocab = MODELS[model]
    return Shape(8, round(1024 / (1 - masked)), width, vocab, masked)
