# SPDX-License-Identifier: Apache-2.0
"""Credit maps as HTML and PNG: every token once, in its colour, whatever is in it."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.diagnostics import SpinalTrace, credit_map
from fastpref.diagnostics.pictures import MOST_LINES, WIDTH, _laid_out

PNG = b"\x89PNG\r\n\x1a\n"
TOKENS = ["The", " <b>answer</b>", " is", "\n", "$x^2$ &", " \u4f60\u597d", "\x00", "."]
CREDIT = [0.5, -1.0, 0.0, 0.25, -0.5, 1.0, 0.1, -0.1]


def test_a_map_in_both_forms(tmp_path: Path) -> None:
    page, picture = credit_map(TOKENS, torch.tensor(CREDIT), tmp_path / "a.b", title="<one>")
    assert (page.name, picture.name) == ("a.b.html", "a.b.png")
    assert picture.read_bytes().startswith(PNG) and picture.stat().st_size > 5000
    text = page.read_text(encoding="utf-8")
    spans = re.findall(r'<span style="background:rgba\((.*?)\)" title="(.*?)">(.*?)</span>', text,
                       re.DOTALL)  # fmt: skip
    shown = [html.unescape(one).replace("\u23ce\n", "\n") for _, _, one in spans]
    assert shown == TOKENS and "<b>" not in text and "<h1>&lt;one&gt;</h1>" in text
    assert [float(number) for _, number, _ in spans] == pytest.approx(CREDIT)
    for (colour, _, _), value in zip(spans, CREDIT, strict=True):
        red, _, blue, strength = (float(one) for one in colour.split(","))
        assert strength == pytest.approx(0.8 * abs(value), abs=1e-3)
        assert value == 0 or (blue > red) == (value > 0)


@pytest.mark.parametrize("name", ["x.html", "x.png", "x"])
def test_a_suffix_is_taken_off(tmp_path: Path, name: str) -> None:
    page, picture = credit_map(["a"], [0.0], str(tmp_path / name))
    assert (page.name, picture.name) == ("x.html", "x.png")


def test_lines_are_filled_and_nothing_is_lost() -> None:
    tokens = ["word "] * 60 + ["x" * 250] + ["\u4f60"] * 60 + ["a\nb"]
    pieces, lines = _laid_out(tokens)
    texts = ["" for _ in tokens]
    for line, column, text, at in pieces:
        size = sum(2 if one == "\u4f60" else 1 for one in text)
        assert 0 <= line < lines and 0 <= column and column + size <= WIDTH
        texts[at] += text
    assert texts == [one.replace("\n", "\u23ce") for one in tokens]


@pytest.mark.heavy
def test_a_very_long_response_is_cut_off_in_the_picture(tmp_path: Path) -> None:
    tokens = ["word\n"] * (MOST_LINES + 50)
    _, picture = credit_map(tokens, [1.0] * len(tokens), tmp_path / "long")
    assert picture.read_bytes().startswith(PNG)


def test_layers(tmp_path: Path) -> None:
    one = SpinalTrace([1.0, 2.0, 1.5], [0.2, 0.4], 10)
    path = one.plot(tmp_path / "layers.png", label="after", others={"before": one})
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("tokens", "credit", "error", "match"),
    [
        ("text", [1.0] * 4, TypeError, "tokens must be a list of texts"),
        ([1, 2], [1.0, 2.0], TypeError, "tokens must be a list of texts"),
        (["a"], [1.0, 2.0], ValueError, "one number for each of 1 tokens"),
        ([], [], ValueError, "at least one"),
        (["a"], [float("nan")], ValueError, "credit must be finite"),
    ],
)
def test_bad_use(
    tmp_path: Path, tokens: Any, credit: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        credit_map(tokens, credit, tmp_path / "x")
