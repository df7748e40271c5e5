# SPDX-License-Identifier: Apache-2.0
"""The README's GPU table, from the JSON that `make gpu` writes.

python benchmarks/gpu_table.py benchmarks/results/<date>-gpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(report: dict[str, Any]) -> str:
    """Markdown: a row a candidate, a column a case; times and ratios to the bare products."""
    machine, cases = report["machine"], report["cases"]
    names: list[str] = []
    for case in cases:
        names += [name for name in case["timings"] if name not in names]
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "chip")
    heads = [_head(case) for case in cases]
    lines = [
        f"{machine['chip']}, bfloat16, median over interleaved rounds ({versions}):",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in names:
        cells = [_cell(case["timings"].get(name)) for case in cases]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _head(case: dict[str, Any]) -> str:
    shape = case["shape"]
    rows = shape["sequences"] * shape["length"]
    return f"{rows}, {shape['hidden_size']}, {shape['vocab_size']}: {case['case']}"


def _cell(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return "not measured"
    return f"{timing['milliseconds']:.1f} ms, {timing['ratio']:.2f}x, {timing['peak']:.0f} MiB"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
