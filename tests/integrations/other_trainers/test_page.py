# SPDX-License-Identifier: Apache-2.0
"""The page's table and its sections belong together, and every block of code is run by a test."""

import ast
import re
from pathlib import Path

from tests.integrations.other_trainers.page import page, sections


def test_every_row_has_a_section() -> None:
    linked = set(re.findall(r"\(#([\w-]+)\)", page()))
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in sections()}
    assert linked == anchors


def test_every_block_is_run() -> None:
    blocks = {
        (title, number) for title, found in sections().items() for number in range(len(found))
    }
    run = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_lines":
                title, number = node.args[:2]
                assert isinstance(title, ast.Constant)
                numbers = [number.value] if isinstance(number, ast.Constant) else range(2)
                run |= {(title.value, one) for one in numbers}
    assert blocks == run
