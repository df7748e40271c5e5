# SPDX-License-Identifier: Apache-2.0
"""Puts the tables of a benchmark's JSON into the README, and its pictures beside the JSON:

python benchmarks/readme.py benchmarks/results/<date>-cpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastpref.bench import report as reporting

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- bench -->", "<!-- end of bench -->"


def with_tables(text: str, tables: str) -> str:
    """``text`` with ``tables`` between the two marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(END) < text.index(START):
        raise ValueError(f"the text must hold {START} and, after it, {END}, once each")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n\n{tables}\n\n{END}{after}"


def main(path: Path) -> None:
    report = json.loads(path.read_text())
    tables = reporting.markdown(report)
    README.write_text(with_tables(README.read_text(encoding="utf-8"), tables), encoding="utf-8")
    for written in (README, *reporting.pictures(report, path.with_suffix(""))):
        print(f"written to {written}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
