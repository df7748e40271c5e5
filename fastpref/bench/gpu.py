# SPDX-License-Identifier: Apache-2.0
"""What ``make gpu`` measures, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .experiment import MODES, Case, Mode
from .work import MODELS, Shape

# Cases that have not begun by then are left out, and listed; so are those of the memory curve.
SECONDS, MEMORY_SECONDS = 240, 60
HEADS = ("llama-3.2-1b", "llama-3-8b", "qwen2.5-0.5b")
BELOW: tuple[Mode, ...] = ("frozen head", "forward")
TOKENS = (2048, 4096, 8192)  # of the memory curve


def cases() -> Iterator[tuple[Case, bool]]:
    """Packed rows of a real head and losses in one call on padded batches, then other heads; and
    whether peers that compile themselves for half a minute are worth it."""
    small = _shape(HEADS[0], 0.0)
    padded = _shape(HEADS[0], 0.5)
    yield _case("score", "trainable head", small), True
    yield _case("dpo", "trainable head", padded), True
    yield _case("score", "trainable head", _shape(HEADS[1], 0.0)), False
    yield _case("divergence", "trainable head", padded), True
    for what in ("heads", "grpo", "step"):
        yield _case(what, "trainable head", padded), False
    for mode in BELOW:
        yield _case("score", mode, small), False
    for what in ("kto", "simpo", "orpo"):
        yield _case(what, "trainable head", padded), False
    for mode in BELOW:
        yield _case("score", mode, _shape(HEADS[1], 0.0)), False
    for mode in reversed(MODES):
        yield _case("score", mode, _shape(HEADS[2], 0.0)), False
    yield replace(_case("score", "trainable head", small), logits="random"), False


def _case(what: str, mode: Mode, shape: Shape) -> Case:
    return Case(what, mode, "bfloat16", shape, device="cuda")


def memory_cases() -> Iterator[Case]:
    for scored in TOKENS:
        shape = replace(_shape(HEADS[1], 0.0), length=scored // 8)
        yield _case("score", "trainable head", shape)


def _shape(model: str, masked: float) -> Shape:
    """8192 scored tokens."""
    width, vocab = MODELS[model]
    return Shape(8, round(1024 / (1 - masked)), width, vocab, masked)
