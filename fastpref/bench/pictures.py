# SPDX-License-Identifier: Apache-2.0
"""A report's pictures, as PNG: time over the limit and error by implementation, memory by tokens,
growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import groups, growth, implementations, share
from .scaling import BUDGET
from .suites import SUITES

OWN, PEER = "#1f6f8b", "#b9b4a7"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """PNG files in ``folder``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, cases in groups(report):
        figures[f"{name}-time"] = _bars(plt, cases, "ratio", "time over the bare products")
        figures[f"{name}-error"] = _bars(plt, cases, "error", "error against float64")
    if report.get("memory"):
        figures["memory"] = _memory(plt, report["memory"])
    if report.get("curves"):
        figures["growth"] = _curves(plt, report["curves"])
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written


def _bars(plt: Any, cases: list[dict[str, Any]], key: str, label: str) -> Any:
    """A panel a case, an implementation a bar."""
    names = implementations(cases)[::-1]
    columns = len({case["mode"] for case in cases})
    rows = -(-len(cases) // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(1.5 + 3.6 * columns, 0.9 + rows * (0.5 + 0.26 * len(names))),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, case in zip(panels.flat, cases, strict=False):
        _panel(panel, case, names, key)
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    figure.suptitle(f"{SUITES[cases[0]['what']].title}: {label}", fontsize="medium")
    return figure


def _panel(panel: Any, case: dict[str, Any], names: list[str], key: str) -> None:
    found = [case["timings"].get(name, {}).get(key) for name in names]
    own = case["what"] == "heads"
    colours = [OWN if own or name.startswith("fastpref") else PEER for name in names]
    panel.barh(names, [value or 0.0 for value in found], color=colours, height=0.7)
    panel.set_xscale("log")
    for place, value in enumerate(found):
        if value:
            said = share(value) if key == "ratio" else f"{value:.0e}"
            panel.annotate(
                said, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
    if key == "ratio":
        panel.axvline(1, color="black", linewidth=0.8)
    panel.margins(x=0.15)
    panel.set_title(f"{case['dtype']}, {case['mode']}", fontsize="small")
    panel.tick_params(labelsize=7)


def _memory(plt: Any, rows: list[dict[str, Any]]) -> Any:
    figure, panel = plt.subplots(figsize=(8.5, 4), layout="constrained")
    by_name: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        by_name.setdefault(row["implementation"], []).append((row["scored"], row["peak"]))
    logits = sorted({(row["scored"], row["logits"]) for row in rows})
    panel.plot(*zip(*logits, strict=True), "k--", label="(N, V) logits alone")
    for name, points in by_name.items():
        style = "o-" if name.startswith("fastpref") else "s:"
        panel.plot(*zip(*sorted(points), strict=True), style, label=name, markersize=4)
    panel.set_title(f"{rows[0]['dtype']}, H={rows[0]['hidden_size']}, V={rows[0]['vocab_size']}")
    panel.set_xlabel("scored tokens")
    panel.set_ylabel("peak MiB above the inputs")
    panel.set_yscale("log")
    panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _curves(plt: Any, curves: dict[str, list[dict[str, Any]]]) -> Any:
    """Time above, workspace below, an axis a column."""
    figure, panels = plt.subplots(
        2, len(curves), figsize=(4 * len(curves), 5), squeeze=False, layout="constrained"
    )
    for (axis, rows), time, workspace in zip(curves.items(), *panels, strict=True):
        at = [row["size"] for row in rows]
        time.loglog(at, [row["products"] for row in rows], "k--", label="bare products")
        time.loglog(at, [row["seconds"] for row in rows], "o-", color=OWN, label="fastpref")
        time.set_ylabel("seconds")
        time.set_title(growth(axis, rows).split(";")[0], fontsize=7)
        time.legend(fontsize="small")
        for key, label, style in (
            ("logits", "(N, V) logits", "k--"),
            ("rows", "(N, H) rows", "k:"),
            ("workspace", f"workspace within {BUDGET} MiB", "o-"),
        ):
            workspace.loglog(at, [row[key] for row in rows], style, label=label)
        for panel in (time, workspace):
            panel.set_xticks(at, [str(one) for one in at], fontsize=7, rotation=45)
            panel.set_xticks([], minor=True)
        workspace.set_ylabel("MiB")
        workspace.set_xlabel(axis)
        workspace.legend(fontsize="small")
    return figure
