# SPDX-License-Identifier: Apache-2.0
"""Puts the tables and pictures of benchmarks/results/*.json into the README:

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastpref.bench import machine, pictures, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
START, END = "<!-- bench -->", "<!-- end of bench -->"
# Of the suites, those whose bars are shown.
SHOWN = ("score",)


def section(results: dict[str, dict[str, Any]], drawn: dict[str, list[str]]) -> str:
    """Markdown of the reports by path; ``drawn`` are the paths of their pictures."""
    parts = []
    for path, result in results.items():
        ran = machine.headline(result["machine"]).removeprefix("fastpref bench: ")
        parts.append(f"[{path}]({path}): {ran}.")
        parts += [report.markdown(result)] if result.get("cases") else []
        parts += [report.markdown_curves(result)] if result.get("curves") else []
        parts += [f"![{Path(one).stem}]({one})" for one in drawn[path]]
    return "\n\n".join(parts)


def with_section(text: str, inside: str) -> str:
    """``text`` with ``inside`` between the two marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(END) < text.index(START):
        raise ValueError(f"the text must hold {START} and, after it, {END}, once each")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n\n{inside}\n\n{END}{after}"


def load() -> dict[str, dict[str, Any]]:
    """The reports by path."""
    paths = sorted(RESULTS.glob("*.json"))
    return {path.relative_to(ROOT).as_posix(): json.loads(path.read_text()) for path in paths}


def shown(result: dict[str, Any]) -> dict[str, Any]:
    cases = [case for case in result.get("cases", ()) if case["what"] in SHOWN]
    return result | {"cases": cases}


def main() -> None:
    results = load()
    drawn = {}
    for path, result in results.items():
        files = pictures.draw(shown(result), (ROOT / path).with_suffix(""))
        drawn[path] = [file.relative_to(ROOT).as_posix() for file in files]
    text = with_section(README.read_text(encoding="utf-8"), section(results, drawn))
    README.write_text(text, encoding="utf-8")
    print(f"{README}: {len(results)} reports, {sum(map(len, drawn.values()))} pictures")


if __name__ == "__main__":
    main()
