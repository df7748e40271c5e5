# SPDX-License-Identifier: Apache-2.0
"""Puts the tables and pictures of results/*.json into the README beside this, and draws the picture
of the README above:

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastpref.bench import machine, pictures, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"
PREDICTIONS = ROOT / "benchmarks" / "predictions.json"
START, END = "<!-- bench -->", "<!-- end of bench -->"
GPU_START, GPU_END = "<!-- gpu -->", "<!-- end of gpu -->"
# Of the suites, those whose bars are shown.
SHOWN = ("score",)


def section(results: dict[str, dict[str, Any]], drawn: dict[str, list[str]]) -> str:
    """Markdown of the reports by path; ``drawn`` are the paths of their pictures."""
    parts = []
    for path, result in results.items():
        ran = machine.headline(result["machine"]).removeprefix("fastpref bench: ")
        parts.append(f"[{Path(path).name}]({beside(path)}): {ran}.")
        parts += [report.markdown(result)] if result.get("cases") else []
        parts += [report.markdown_curves(result)] if result.get("curves") else []
        parts += [f"![{Path(one).stem}]({beside(one)})" for one in drawn[path]]
    return "\n\n".join(parts)


def beside(path: str) -> str:
    """A path of the repository as README.md links to it."""
    return path.removeprefix("benchmarks/")


def of_gpu(result: dict[str, Any]) -> bool:
    """Whether the report is one of ``make gpu``, on a GPU."""
    return "driver" in result["machine"]


def gpu_section(results: dict[str, dict[str, Any]], predictions: list[dict[str, Any]]) -> str:
    """Markdown of the GPUs' reports by path: predictions beside what was measured, then all that
    was."""
    parts = [_predicted(results, predictions)]
    for path, result in results.items():
        ran = machine.headline(result["machine"]).removeprefix("fastpref bench: ")
        parts.append(f"[{Path(path).name}]({beside(path)}): {ran}.")
        said = report.terminal_summary(result).splitlines()
        parts += ["\n".join(f"- {line}" for line in said)] if said else []
        parts += [report.markdown(result)] if result.get("cases") else []
    return "\n\n".join(parts)


def _predicted(results: dict[str, dict[str, Any]], predictions: list[dict[str, Any]]) -> str:
    """A row for each implementation and mode; of each head what was predicted, what is aimed at,
    and what was measured, as ratios to the bare products."""
    heads = list(dict.fromkeys((one["hidden_size"], one["vocab_size"]) for one in predictions))
    rows: dict[str, list[str]] = {}
    for one in predictions:
        call = ", TRL's call" * (one["what"] == "call")
        cells = rows.setdefault(f"{one['implementation']}{call}: {one['mode']}", [])
        target = "" if one["target"] is None else f"{one['target']:.2f}"
        cells += [one["predicted"] or "", target, ", ".join(_measured(results, one)) or "no"]
    columns = [f"H={width}, V={vocab}: predicted | aim | measured" for width, vocab in heads]
    return "\n".join(
        [
            "| | " + " | ".join(columns) + " |",
            "|---" * (3 * len(heads) + 1) + "|",
            *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()),
        ]
    )


def _measured(results: dict[str, dict[str, Any]], wanted: dict[str, Any]) -> list[str]:
    """On each machine."""
    found = []
    for result in results.values():
        for case in result.get("cases", ()):
            asked = {key: case[key] for key in ("what", "mode")} | case["shape"]
            timing = case["timings"].get(wanted["implementation"])
            same = all(
                asked[key] == wanted[key] for key in ("what", "mode", "hidden_size", "vocab_size")
            )
            if same and timing is not None and case["logits"] == "trained":
                found.append(f"{timing['ratio']:.2f} ({result['machine']['chip']})")
    return found


def with_section(text: str, inside: str, start: str = START, end: str = END) -> str:
    """``text`` with ``inside`` between the two marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
        raise ValueError(f"the text must hold {start} and, after it, {end}, once each")
    before, rest = text.split(start)
    after = rest.split(end)[1]
    return f"{before}{start}\n\n{inside}\n\n{end}{after}"


def load(gpu: bool = False) -> dict[str, dict[str, Any]]:
    """The reports by path: of CPUs, or of GPUs."""
    paths = sorted(RESULTS.glob("*.json"))
    found = {path.relative_to(ROOT).as_posix(): json.loads(path.read_text()) for path in paths}
    return {path: result for path, result in found.items() if of_gpu(result) == gpu}


def shown(result: dict[str, Any]) -> dict[str, Any]:
    cases = [case for case in result.get("cases", ()) if case["what"] in SHOWN]
    return result | {"cases": cases}


def main() -> None:
    results = load()
    drawn = {}
    for path, result in results.items():
        files = pictures.draw(shown(result), (ROOT / path).with_suffix(""))
        drawn[path] = [
            file.relative_to(ROOT).as_posix() for file in files if file.stem != pictures.OVERVIEW
        ]
    text = with_section(README.read_text(encoding="utf-8"), section(results, drawn))
    inside = gpu_section(load(gpu=True), json.loads(PREDICTIONS.read_text()))
    text = with_section(text, inside, GPU_START, GPU_END)
    README.write_text(text, encoding="utf-8")
    print(f"{README}: {len(results)} reports, {sum(map(len, drawn.values()))} pictures")


if __name__ == "__main__":
    main()
