# SPDX-License-Identifier: Apache-2.0
"""Results as a terminal table, CSV and Markdown.

A report is what ``python -m fastpref bench --out`` writes as JSON: ``machine``, and of ``cases``
(cases.measure), ``memory`` (memory.measure), ``trainings`` (trainers.runs.measure) and ``curves``
(rows of scaling.point by axis) those that were measured. Of ``--quick`` also ``left_out`` (reasons
by dtype). Of ``--suite gpu`` also ``checks`` (checks.check, properties.observe), ``tests``
(pytests.run), ``unavailable`` (reasons by backend) and ``failed`` (reasons by item).
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .cases import LIMIT
from .denoising import of_a_step
from .losses import OVERFLOWING
from .machine import headline
from .scaling import BUDGET, exponent
from .suites import SUITES
from .work import Shape

Rows = Sequence[dict[str, Any]]
COLUMNS = (
    *("what", "device", "dtype", "mode", "logits", "scored", "hidden_size", "vocab_size"),
    *("implementation", "seconds", "ratio", "low", "high", "error", "peak"),
)


def sizes(case: dict[str, Any]) -> str:
    shape, entropy = Shape(**case["shape"]), case["entropy"]
    said = f"N={shape.scored} of {shape.positions}, H={shape.hidden_size}, V={shape.vocab_size}"
    return said if entropy is None else f"{said}, {entropy:.1f} nats a token"


def title(case: dict[str, Any]) -> str:
    return f"{SUITES[case['what']].title}: {case['dtype']}, {case['mode']}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f}us"


def share(ratio: float) -> str:
    """Of the bare products."""
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2%}"


def terminal_case(case: dict[str, Any]) -> str:
    """One case: time, ratio to the bare products with its spread (20th and 80th
    percentile, of fewer than five rounds the ends), error against float64, and on a
    GPU the peak memory."""
    timings = case["timings"]
    peaks = any(one["peak"] is not None for one in timings.values())
    heads = f"  {'':32}{'time':>10}{'ratio':>8}{'low':>8}{'high':>8}{'error':>10}"
    lines = [title(case), f"  ({sizes(case)})", heads + ("peak MiB".rjust(11) if peaks else "")]
    for name, one in timings.items():
        error = "" if one["error"] is None else f"{one['error']:.1e}"
        peak = f"{one['peak']:11.0f}" if peaks else ""
        spread = "".join(f"{share(one[key]):>8}" for key in ("ratio", "low", "high"))
        lines.append(f"  {name:32}{duration(one['seconds']):>10}{spread}{error:>10}{peak}")
    if OVERFLOWING in timings and "fastpref" in timings:
        cost = timings[OVERFLOWING]["ratio"] / timings["fastpref"]["ratio"]
        lines.append(f"  1% overflowing rows cost {cost:.2f}x of the same case without")
    lines += [f"  {one}" for one in _notes(case)]
    lines += [f"  {name}: not measured, {why}" for name, why in case["skipped"].items()]
    lines += [f"  fastpref warned: {one}" for one in case.get("warnings", ())]
    return "\n".join(lines)


def _notes(case: dict[str, Any]) -> list[str]:
    """What a table of the case must not leave unsaid."""
    said = of_a_step(case) if case["what"] == "denoising" else ""
    return [said] if said else []


def terminal_memory(rows: Rows) -> str:
    names = ("measured", "gradients", "workspace", "(N, V) logits")
    first = rows[0]
    lines = [
        "peak memory of DPO above its inputs, trainable head, "
        f"{first['dtype']}, H={first['hidden_size']}, V={first['vocab_size']} (MiB)",
        f"  {'':36}{'N':>6}" + "".join(f"{name:>15}" for name in names),
    ]
    for row in rows:
        values = (row[key] for key in ("peak", "gradients", "workspace", "logits"))
        numbers = "".join(f"{'':15}" if value is None else f"{value:15.0f}" for value in values)
        lines.append(f"  {row['implementation']:36}{row['scored']:6}{numbers}")
    return "\n".join(lines)


def terminal_trainings(rows: Rows) -> str:
    first = rows[0]
    lines = [
        f"trainings in TRL on {first['pairs']}, {first['steps']} steps of {first['batch']} pairs "
        f"within {first['max_length']} tokens, float32: {first['layers']} layers, "
        f"H={first['hidden']}, V={first['vocabulary']}",
        f"  {'':24}{'':10}" + "".join(f"{name:>12}" for name in ("step", "head", "peak MiB")),
    ]
    for row in rows:
        way = "LoRA" if row["adapters"] else "all parameters"
        lines.append(f"  {row['method']}, {way}: losses within {row['difference']:.1e}")
        for side in ("stock", "fastpref"):
            own = row[side]
            head = f"{own['head'] / own['step']:.0%}"
            lines.append(
                f"  {'':24}{side:10}{duration(own['step']):>12}{head:>12}{own['peak']:12.0f}"
            )
        stock, ours = row["stock"], row["fastpref"]
        ratios = (f"{stock[key] / ours[key]:.2f}x" for key in ("step", "head", "peak"))
        lines.append(f"  {'':24}{'less by':10}" + "".join(f"{one:>12}" for one in ratios))
    return "\n".join(lines)


def terminal_curve(axis: str, rows: Rows) -> str:
    names = (axis, "fastpref", "products", "ratio", "workspace", "(N, H)", "(N, V), MiB")
    lines = ["  " + "".join(f"{name:>12}" for name in names)]
    for row in rows:
        memory = "".join(f"{row[key]:12.0f}" for key in ("workspace", "rows", "logits"))
        lines.append(
            f"  {row['size']:12}{duration(row['seconds']):>12}{duration(row['products']):>12}"
            f"{row['seconds'] / row['products']:11.2f}x{memory}"
        )
    return "\n".join([*lines, f"  {growth(axis, rows)}"])


def growth(axis: str, rows: Rows) -> str:
    if len(rows) < 2:
        return "fewer than two sizes: no growth"
    found = ", ".join(
        f"{name} {exponent(rows, key):.2f}"
        for name, key in (("fastpref", "seconds"), ("products", "products"))
    )
    first, last = rows[0], rows[-1]
    spaces = ", ".join(
        f"{name} {first[key]:.0f} to {last[key]:.0f} MiB"
        for name, key in (("workspace", "workspace"), ("(N, H)", "rows"), ("(N, V)", "logits"))
    )
    return (
        f"time grows with {axis} to the power of: {found}; with a budget of {BUDGET} MiB, to which "
        f"a few (N, H) copies of rows are added: {spaces}"
    )


def terminal_check(row: dict[str, Any]) -> str:
    verdict = {True: "ok", False: "WRONG", None: "not seen"}[row["passed"]]
    said = [] if row.get("share") is None else [f"{row['share']:.2f} of its bound ({row['worst']})"]
    said += [row["reason"]] if row["reason"] else []
    return f"  {row['lane'] + ': ' + row['case']:64} {verdict:9}{'; '.join(said)}".rstrip()


def terminal_tests(row: dict[str, Any]) -> str:
    counts = f"{row['passed']} passed, {len(row['failed'])} failed, {row['skipped']} skipped"
    end = "" if row["finished"] else ", cut short"
    reason = f"; {row['reason']}" if row.get("reason") else ""
    return "\n".join(
        [f"  tests of {row['tests']}: {counts}{end}{reason}", *(f"    {x}" for x in row["failed"])]
    )


def terminal_left_out(reasons: dict[str, str]) -> str:
    return "\n".join(
        f"{dtype} left out of --quick: {why}; --dtype {dtype} measures it"
        for dtype, why in reasons.items()
    )


def terminal_summary(report: dict[str, Any]) -> str:
    """Of ``--suite gpu``: a line for each way to serve the device."""
    lines = []
    for lane, rows in by_lane(report).items():
        wrong = [row["case"] for row in rows if row["passed"] is False]
        seen = [row for row in rows if row["passed"] is not None]
        lines.append(
            f"fastpref, {lane}: {len(seen) - len(wrong)} of {len(seen)} checks passed"
            + (f"; wrong: {', '.join(wrong)}" if wrong else "")
        )
    lines += [
        f"fastpref, {lane}: not available: {why}"
        for lane, why in report.get("unavailable", {}).items()
    ]
    lines += [f"{name}: failed: {why}" for name, why in report.get("failed", {}).items()]
    return "\n".join(lines)


def by_lane(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report.get("checks", ()):
        found.setdefault(row["lane"], []).append(row)
    return found


def terminal(report: dict[str, Any]) -> str:
    parts = [headline(report["machine"])]
    parts += [terminal_left_out(report["left_out"])] if report.get("left_out") else []
    parts += ["\n".join(map(terminal_check, report["checks"]))] if report.get("checks") else []
    parts += [terminal_case(case) for case in report.get("cases", ())]
    if report.get("memory"):
        parts.append(terminal_memory(report["memory"]))
    if report.get("trainings"):
        parts.append(terminal_trainings(report["trainings"]))
    parts += [terminal_curve(axis, rows) for axis, rows in report.get("curves", {}).items()]
    parts += [terminal_tests(row) for row in report.get("tests", ())]
    parts += [terminal_summary(report)] if "unavailable" in report else []
    return "\n\n".join(parts)


def comma_separated(report: dict[str, Any]) -> str:
    """A row for each timing of each case, under ``COLUMNS``."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for case in report.get("cases", ()):
        shape = case["shape"]
        shared = {key: case[key] for key in ("what", "device", "dtype", "mode", "logits")}
        shared |= {key: shape[key] for key in ("hidden_size", "vocab_size")}
        for name, timing in case["timings"].items():
            row = {"scored": Shape(**shape).scored, "implementation": name}
            writer.writerow(shared | row | timing)
    return out.getvalue()


def groups(report: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Cases that differ in dtype and mode alone, with a name for their table or picture."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in report.get("cases", ()):
        shape = case["shape"]
        size = f"{Shape(**shape).scored}x{shape['hidden_size']}x{shape['vocab_size']}"
        name = f"{case['what']}-{size}-{case['logits']}"
        found.setdefault(name, []).append(summed_up(case))
    yield from found.items()


def summed_up(case: dict[str, Any]) -> dict[str, Any]:
    """Of the objectives alone, of which there are dozens, the fastest, the median, the slowest."""
    if case["what"] != "heads" or len(case["timings"]) < 5:
        return case
    products = {LIMIT: case["timings"][LIMIT]}
    ordered = sorted((one["ratio"], name) for name, one in case["timings"].items() if name != LIMIT)
    middle = statistics.median_low(ordered)
    chosen = {"fastest": ordered[0], "median": middle, "slowest": ordered[-1]}
    rows = {key: case["timings"][name] for key, (_, name) in chosen.items()}
    return case | {"timings": products | rows}


def implementations(cases: Iterable[dict[str, Any]]) -> list[str]:
    """Of all the cases, fastpref's first, the limit left out."""
    names: dict[str, None] = {}
    for case in cases:
        names |= dict.fromkeys(name for name in case["timings"] if name != LIMIT)
    return sorted(names, key=lambda name: not name.startswith("fastpref"))


def markdown(report: dict[str, Any]) -> str:
    """A table for each group of cases: an implementation a row, a dtype and mode a column, ratios
    to the bare products."""
    return "\n\n".join(_table(cases) for _, cases in groups(report))


def markdown_curves(report: dict[str, Any]) -> str:
    """A line for each axis: its ends and the exponents."""
    return "\n".join(
        f"- {axis} from {rows[0]['size']} to {rows[-1]['size']}: {growth(axis, rows)}."
        for axis, rows in report["curves"].items()
    )


def _table(cases: list[dict[str, Any]]) -> str:
    first = cases[0]
    heads = [f"{case['dtype']}, {case['mode']}" for case in cases]
    lines = [
        f"**{SUITES[first['what']].title}** ({sizes(first)})",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in implementations(cases):
        cells = [_cell(case, name) for case in cases]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for case, head in zip(cases, heads, strict=True):
        lines += [f"\n{head}: {one}." for one in _notes(case)]
    return "\n".join(lines)


def _cell(case: dict[str, Any], name: str) -> str:
    timing = case["timings"].get(name)
    if timing is None:
        return "not measured" if name in case["skipped"] else ""
    if case["device"] == "cpu":
        return share(timing["ratio"])
    return f"{duration(timing['seconds'])}, {share(timing['ratio'])}, {timing['peak']:.0f} MiB"
