# SPDX-License-Identifier: Apache-2.0
"""A report's pictures, as PNG: time over the limit and error by implementation, memory by tokens,
growth, and of time and memory an overview. Everywhere lower is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cases import LIMIT
from .report import groups, growth, implementations, share, sizes
from .scaling import BASE, BUDGET
from .suites import SUITES

# Of Okabe and Ito's colours, which most eyes tell apart; shapes and dashes differ too.
OWN, PEER = "#0072b2", "#b9b4a7"
COLOURS = (
    *("#0072b2", "#009e73", "#56b4e9", "#d55e00", "#cc79a7"),
    *("#e69f00", "#7f7f7f", "#8c510a", "#332288", "#999933"),
)
MARKERS = "osDv^<>PX*"
OVERVIEW = "overview"
# Of fastpref what a user meets, beside all others.
SHOWN = ("fastpref", "fastpref, recompute, 32 MiB")


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
        figures[f"{name}-time"] = _bars(plt, report, cases, "ratio", TIME)
        figures[f"{name}-error"] = _bars(plt, report, cases, "error", ERROR)
    if report.get("memory"):
        figures["memory"] = _memory(plt, report, report["memory"])
    trained = [
        case for case in report.get("cases", ()) if (case["what"], case["mode"]) == OVERVIEW_OF
    ]
    if report.get("memory") and trained:
        figures[OVERVIEW] = _overview(plt, report, trained[-1])
    if report.get("curves"):
        figures["growth"] = _curves(plt, report, report["curves"])
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written


TIME = "time, 1x being the bare matrix products of the scored tokens"
# Of what ``experiment.errors`` finds; beyond twice that of plain torch the error contract ends.
PLAIN = "plain torch"
ERROR = (
    "relative error against float64, the largest of scores, loss and\n"
    f"gradients (root mean square; dashed: twice that of {PLAIN})"
)
OVERVIEW_OF = ("score", "trainable head")


def _ran(report: dict[str, Any]) -> str:
    """On what."""
    machine = report["machine"]
    return f"{machine['chip']}, {machine['threads']} threads, torch {machine['torch']}"


def _bars(
    plt: Any, report: dict[str, Any], cases: list[dict[str, Any]], key: str, label: str
) -> Any:
    """A panel a case, an implementation a bar."""
    names = implementations(cases)[::-1]
    columns = len({case["mode"] for case in cases})
    rows = -(-len(cases) // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(2.2 + 2.6 * columns, 0.9 + rows * (0.5 + 0.26 * len(names))),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, case in zip(panels.flat, cases, strict=False):
        _panel(panel, case, names, key)
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    figure.suptitle(
        f"{SUITES[cases[0]['what']].title}: {label}. Lower is better.\n"
        f"{sizes(cases[0])}; {_ran(report)}",
        fontsize="medium",
    )
    return figure


def _overview(plt: Any, report: dict[str, Any], case: dict[str, Any]) -> Any:
    """Time of a training step's head and the most memory of one, side by side."""
    rows = report["memory"]
    most = max(row["scored"] for row in rows)
    peaks = {row["implementation"]: row["peak"] for row in rows if row["scored"] == most}
    times = {name: one["ratio"] for name, one in case["timings"].items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    first = rows[0]
    for panel, found, said, title in (
        (left, times, share, f"Time, {case['dtype']}; dashed: the bare products\n{sizes(case)}"),
        (
            right,
            peaks,
            "{:.0f} MiB".format,
            f"Peak memory above the inputs, {first['dtype']}\n"
            f"N={most}, H={first['hidden_size']}, V={first['vocab_size']}",
        ),
    ):
        kept = [name for name in found if name in SHOWN or name in _peers(found)][::-1]
        colours = [OWN if name in SHOWN else PEER for name in kept]
        labels = [name.replace(", recompute, 32 MiB", ", 32 MiB budget") for name in kept]
        panel.barh(labels, [found[name] for name in kept], color=colours, height=0.7)
        for place, name in enumerate(kept):
            at = (found[name], place)
            panel.annotate(said(found[name]), at, (3, 0), textcoords="offset points", va="center")
        panel.set_xlim(0, 1.22 * max(found[name] for name in kept))
        panel.set_title(title, fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
    left.axvline(1, color="black", linewidth=1, linestyle="--")
    figure.suptitle(f"Trainable head, forward and backward. Lower is better. {_ran(report)}")
    return figure


def _peers(found: dict[str, float]) -> list[str]:
    return [name for name in found if not name.startswith(("fastpref", LIMIT))]


def _panel(panel: Any, case: dict[str, Any], names: list[str], key: str) -> None:
    found = [case["timings"].get(name, {}).get(key) for name in names]
    own = case["what"] == "heads"
    colours = [OWN if own or name.startswith("fastpref") else PEER for name in names]
    panel.set_xscale("log")
    limit = 1.0
    if key == "ratio":
        panel.barh(names, [value or 0.0 for value in found], color=colours, height=0.7)
        panel.axvline(limit, color="black", linewidth=0.8)
    else:  # which has no origin for a bar to start from
        limit = 2 * (case["timings"].get(PLAIN, {}).get(key) or 0.0)
        shown = [value or float("nan") for value in found]
        panel.scatter(shown, names, color=colours, s=28, zorder=2)
        panel.grid(axis="y", linewidth=0.4)
        if limit:
            panel.axvline(limit, color="black", linewidth=0.8, linestyle="--")
    for place, (name, value) in enumerate(zip(names, found, strict=True)):
        if value:
            said = share(value) if key == "ratio" else f"{value:.0e}"
            at = max(value, limit)  # beside the line
            panel.annotate(
                said, (at, place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        elif name not in case["timings"]:
            left = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
            panel.annotate("not run", (0.02, place), color="#555555", **left)
    panel.margins(x=0.32)
    panel.set_title(f"{case['dtype']}, {case['mode']}", fontsize="small")
    panel.tick_params(labelsize=8)
    if key == "ratio":
        from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter

        panel.xaxis.set_major_locator(FixedLocator([0.01, 0.1, 1, 2, 5, 10, 20, 50, 100]))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%gx"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        from matplotlib.ticker import LogLocator

        panel.xaxis.set_major_locator(LogLocator(numticks=5))
        panel.set_ylim(-0.6, len(names) - 0.4)


def _memory(plt: Any, report: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    figure, panel = plt.subplots(figsize=(8.5, 4), layout="constrained")
    by_name: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        by_name.setdefault(row["implementation"], []).append((row["scored"], row["peak"]))
    logits = sorted({(row["scored"], row["logits"]) for row in rows})
    panel.plot(*zip(*logits, strict=True), "k--", label="(N, V) logits alone")
    for place, (name, points) in enumerate(by_name.items()):
        style = "-" if name.startswith("fastpref") else ":"
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        line = zip(*sorted(points), strict=True)
        panel.plot(*line, marker + style, color=colour, label=name, markersize=5)
    panel.set_title(
        "DPO, trainable head: peak memory above the inputs. Lower is better.\n"
        f"{rows[0]['dtype']}, H={rows[0]['hidden_size']}, V={rows[0]['vocab_size']}; "
        f"{_ran(report)}",
        fontsize="medium",
    )
    panel.set_xlabel("N, scored tokens")
    panel.set_ylabel("peak MiB above the inputs")
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _curves(plt: Any, report: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> Any:
    """Time above, workspace below, an axis a column."""
    figure, panels = plt.subplots(
        2, len(curves), figsize=(3.2 * len(curves), 5), squeeze=False, layout="constrained"
    )
    for (axis, rows), time, workspace in zip(curves.items(), *panels, strict=True):
        at = [row["size"] for row in rows]
        time.loglog(at, [row["products"] for row in rows], "k--", label="bare products")
        time.loglog(at, [row["seconds"] for row in rows], "o-", color=OWN, label="fastpref")
        time.set_ylabel("seconds")
        time.set_title(growth(axis, rows).split(";")[0].replace(": ", ":\n"), fontsize="small")
        for key, label, style in (
            ("logits", "(N, V) logits", "--"),
            ("rows", "(N, H) rows", ":"),
            ("workspace", "workspace: budget, copies of rows", "o-"),
        ):
            colour = OWN if key == "workspace" else "black"
            workspace.loglog(at, [row[key] for row in rows], style, color=colour, label=label)
        workspace.axhline(BUDGET, color=PEER, label=f"budget, {BUDGET} MiB")
        for panel, room in ((time, 30), (workspace, 300)):
            panel.set_xticks(at, [str(one) for one in at], fontsize=7, rotation=45)
            panel.set_xticks([], minor=True)
            panel.yaxis.set_minor_formatter("")
            # Room for a legend above all lines.
            panel.set_ylim(top=panel.get_ylim()[1] * room)
        workspace.set_ylabel("MiB")
        workspace.set_xlabel(axis)
        time.legend(fontsize="x-small", loc="upper left")
        workspace.legend(fontsize="x-small", loc="upper left")
    figure.suptitle(
        "linear_logprob in float32, trainable head, forward and backward, as one size grows. Lower "
        f"is better.\nThe other sizes: N={BASE.scored}, "
        f"H={BASE.hidden_size}, V={BASE.vocab_size}; {_ran(report)}",
        fontsize="medium",
    )
    return figure
