# SPDX-License-Identifier: Apache-2.0
"""A benchmark's JSON as a terminal table, CSV, Markdown and pictures.

``report`` is what ``python -m fastpref bench --out`` writes: ``machine``, ``shape``, ``cases``
(what, dtype, trainable, timings by implementation, skipped) and ``memory``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .suites import LIMIT, OVERFLOWING, SUITES
from .work import Shape

COLUMNS = ("what", "dtype", "head", "implementation", "seconds", "ratio", "low", "high", "error")


def title(case: dict[str, Any]) -> str:
    head = "trainable" if case["trainable"] else "frozen"
    return f"{SUITES[case['what']].title}: {case['dtype']}, {head} head"


def terminal_case(case: dict[str, Any]) -> str:
    """One case: time, ratio to the bare products with its spread, error against float64."""
    timings = case["timings"]
    lines = [title(case), f"  {'':32}{'time':>10}{'ratio':>8}{'p20':>7}{'p80':>7}{'error':>10}"]
    for name, one in timings.items():
        error = "" if one["error"] is None else f"{one['error']:.1e}"
        lines.append(
            f"  {name:32}{one['seconds'] * 1e3:8.1f}ms{one['ratio']:7.2f}x"
            f"{one['low']:6.2f}x{one['high']:6.2f}x{error:>10}"
        )
    if OVERFLOWING in timings:
        share = timings[OVERFLOWING]["ratio"] / timings["fastpref"]["ratio"]
        lines.append(f"  1% overflowing rows cost {share:.2f}x of the same case without")
    lines += [f"  {name}: not measured, {why}" for name, why in case["skipped"].items()]
    return "\n".join(lines)


def terminal_memory(rows: list[dict[str, Any]]) -> str:
    names = ("measured", "gradients", "workspace", "(N, V) logits")
    lines = [
        "peak memory above the inputs, float32, trainable head (MiB)",
        f"  {'':26}{'N':>6}" + "".join(f"{name:>15}" for name in names),
    ]
    for row in rows:
        name = row["schedule"] + (f", budget {row['budget']}" if row.get("budget") else "")
        values = (row[key] for key in ("peak", "gradients", "workspace", "logits"))
        numbers = "".join(f"{value:15.0f}" for value in values)
        lines.append(f"  {name:26}{row['scored']:6}{numbers}")
    return "\n".join(lines)


def terminal(report: dict[str, Any]) -> str:
    parts = [terminal_case(case) for case in report["cases"]]
    return "\n\n".join([headline(report), *parts, terminal_memory(report["memory"])])


def headline(report: dict[str, Any]) -> str:
    machine, shape = report["machine"], Shape(**report["shape"])
    return (
        f"fastpref bench: N={shape.scored} scored of {shape.positions} positions, "
        f"H={shape.hidden_size}, V={shape.vocab_size}, {machine['threads']} threads, "
        f"torch {machine['torch']}, {machine['processor']}"
    )


def comma_separated(report: dict[str, Any]) -> str:
    """A row for each implementation of each case, under ``COLUMNS``."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for case in report["cases"]:
        shared = {
            "what": case["what"],
            "dtype": case["dtype"],
            "head": "trainable" if case["trainable"] else "frozen",
        }
        for name, timing in case["timings"].items():
            writer.writerow(shared | {"implementation": name} | timing)
    return out.getvalue()


def markdown(report: dict[str, Any]) -> str:
    """A table for each kind of work: an implementation a row, a dtype and head a column, ratios to
    the bare products."""
    return "\n\n".join(_markdown_table(report, what) for what in _kinds(report))


def _kinds(report: dict[str, Any]) -> Iterator[str]:
    yield from dict.fromkeys(case["what"] for case in report["cases"])


def _markdown_table(report: dict[str, Any], what: str) -> str:
    cases = [case for case in report["cases"] if case["what"] == what]
    names: dict[str, None] = {}
    for case in cases:
        names |= dict.fromkeys(name for name in case["timings"] if name != LIMIT)
    heads = [
        f"{case['dtype']}, {'trainable' if case['trainable'] else 'frozen'} head" for case in cases
    ]
    lines = [
        f"| {SUITES[what].title} | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in names:
        cells = (case["timings"].get(name) for case in cases)
        ratios = ("not measured" if one is None else f"{one['ratio']:.2f}x" for one in cells)
        lines.append(f"| {name} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def pictures(report: dict[str, Any], folder: Path) -> list[Path]:
    """PNG files in ``folder``: time over the limit and error of each implementation by kind of
    work, and memory by number of tokens.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for what in _kinds(report):
        cases = [case for case in report["cases"] if case["what"] == what]
        for key, label in (("ratio", "time over the bare products"), ("error", "gradient error")):
            figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
            _bars(axes, cases, key)
            axes.set_ylabel(label)
            axes.set_yscale("log")
            axes.set_title(SUITES[what].title)
            if key == "ratio":
                axes.axhline(1, color="black", linewidth=0.8)
            written.append(folder / f"{what}-{key}.png")
            figure.savefig(written[-1], dpi=120)
            plt.close(figure)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    _memory_lines(axes, report["memory"])
    written.append(folder / "memory.png")
    figure.savefig(written[-1], dpi=120)
    plt.close(figure)
    return written


def _bars(axes: Any, cases: list[dict[str, Any]], key: str) -> None:
    names = dict.fromkeys(name for case in cases for name in case["timings"] if name != LIMIT)
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        values = [case["timings"].get(name, {}).get(key) or 0.0 for case in cases]
        at = [number + place * width for number in range(len(cases))]
        axes.bar(at, values, width, label=name)
    heads = [f"{one['dtype']}\n{'trainable' if one['trainable'] else 'frozen'}" for one in cases]
    axes.set_xticks([number + 0.4 - width / 2 for number in range(len(cases))], heads)
    axes.legend(fontsize="small")


def _memory_lines(axes: Any, rows: list[dict[str, Any]]) -> None:
    by_name: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        by_name.setdefault(row["schedule"], []).append((row["scored"], row["peak"]))
    logits = sorted({(row["scored"], row["logits"]) for row in rows})
    axes.plot(*zip(*logits, strict=True), "k--", label="(N, V) logits alone")
    for name, points in by_name.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set_xlabel("scored tokens")
    axes.set_ylabel("peak MiB above the inputs")
    axes.set_ylim(bottom=0)
    axes.legend()
