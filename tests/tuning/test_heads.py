# SPDX-License-Identifier: Apache-2.0
"""Sizes of heads, by name and from a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.bench import work
from fastpref.tuning.heads import MODELS, Head, from_directory


def test_by_name() -> None:
    assert MODELS["qwen2.5-7b"] == (3584, 152064)
    assert set(work.MODELS) < set(MODELS)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"hidden_size": 8, "vocab_size": 9}, Head(8, 9)),
        ({"hidden_size": 8, "vocab_size": 9, "text_config": {"hidden_size": 1}}, Head(8, 9)),
        ({"model_type": "sees", "text_config": {"hidden_size": 8, "vocab_size": 9}}, Head(8, 9)),
        ({"hidden_size": 7, "text_config": {"hidden_size": 8, "vocab_size": 9}}, Head(8, 9)),
    ],
)
def test_from_a_directory(tmp_path: Path, config: dict[str, Any], expected: Head) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_directory(tmp_path) == expected


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "config.json cannot be read"),
        ("{", "config.json cannot be read"),
        ("[]", "names no hidden_size and vocab_size"),
        ("{}", "names no hidden_size and vocab_size"),
        ('{"hidden_size": 8}', "names no hidden_size and vocab_size"),
        ('{"hidden_size": "8", "vocab_size": 9}', "names no hidden_size and vocab_size"),
        ('{"hidden_size": 0, "vocab_size": 9}', "names no hidden_size and vocab_size"),
        ('{"text_config": []}', "names no hidden_size and vocab_size"),
    ],
)
def test_what_cannot_be_told(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{said}.*give --hidden-size and --vocab-size"):
        from_directory(tmp_path)
