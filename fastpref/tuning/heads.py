# SPDX-License-Identifier: Apache-2.0
"""Sizes of heads: by a model's name, or from its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..bench import work


class Head(NamedTuple):
    hidden_size: int  # H
    vocab_size: int  # V


# Those that are measured, and others that are trained often.
MODELS = {name: Head(*sizes) for name, sizes in work.MODELS.items()} | {
    "gemma-2-9b": Head(3584, 256000),
    "gemma-3-1b": Head(1152, 262144),
    "llama-3.2-3b": Head(3072, 128256),
    "llama-3-70b": Head(8192, 128256),
    "mistral-7b": Head(4096, 32768),
    "phi-4": Head(5120, 100352),
    "qwen2.5-1.5b": Head(1536, 151936),
    "qwen2.5-3b": Head(2048, 151936),
    "qwen2.5-14b": Head(5120, 152064),
    "qwen2.5-32b": Head(5120, 152064),
    "qwen3-0.6b": Head(1024, 151936),
    "qwen3-4b": Head(2560, 151936),
    "qwen3-8b": Head(4096, 151936),
    "smollm2-1.7b": Head(2048, 49152),
}


def from_directory(directory: Path) -> Head:
    """Of the model whose config.json lies there; of the text part of one that also sees.

    Raises:
        ValueError: it cannot be told, and why.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; {REMEDY}") from error
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    for part in parts:
        sizes = [_size(part, name) for name in ("hidden_size", "vocab_size")]
        if None not in sizes:
            return Head(*sizes)  # type: ignore[arg-type]
    raise ValueError(f"{path} names no hidden_size and vocab_size; {REMEDY}")


REMEDY = "give --hidden-size and --vocab-size"


def _size(part: Any, name: str) -> int | None:
    value = part.get(name) if isinstance(part, dict) else None
    return value if type(value) is int and value > 0 else None
