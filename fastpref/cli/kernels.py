# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref kernels``: what the Triton kernels take of each chip.

They are compiled here for chips that need not be; nothing runs. All variants of all chips take a
core most of an hour; those of the rows tier alone (``--rows``) some minutes.

Of the rows tier also what a call costs, counted, and what follows from that for an H100 and an
H200, a prediction beside what is aimed at.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.pool import Pool
from typing import TYPE_CHECKING, Any

from ..bench import launches, predictions
from ..bench.predictions import Counts
from . import rows_tier
from .progress import counted

if TYPE_CHECKING:
    from ..kernels.variants import Variant

CAPABILITIES = (80, 90, 100, 120)
ELEMENTS = ("bf16", "fp16", "fp32")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "kernels", help="registers, shared memory and matrix instructions of the Triton kernels"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--rows", action="store_true", help="only the rows tier, which serves by default"
    )
    parser.add_argument(
        "--capability",
        type=int,
        choices=CAPABILITIES,
        action="append",
        help="compute capability, times ten (default: all)",
    )
    parser.add_argument(
        "--element", choices=ELEMENTS, action="append", help="input element (default: all)"
    )


def run(args: argparse.Namespace) -> int:
    """1 where a kernel spills, or takes more shared memory than the chip has."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        print(f"kernels: Triton cannot be imported: {error}; pip install triton", file=sys.stderr)
        return 1
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("kernels: TRITON_INTERPRET=1 compiles nothing; unset it", file=sys.stderr)
        return 2
    wanted = list(itertools.product(args.capability or CAPABILITIES, args.element or ELEMENTS))
    rows: list[dict[str, Any]] = []
    if not args.rows:
        rows = _compiled_variants(wanted)
    tiers = counted(map(_compiled_tier, wanted), len(wanted), "compiling the rows tier:")
    tier = dict(zip(wanted, tiers, strict=True))
    launched = launches.measured()["rows"]
    costs = {one: _counts(one, compiled, launched) for one, compiled in tier.items()}
    if args.json:
        print(json.dumps({"kernels": rows, "rows tier": _plain(costs, tier)}, indent=1))
    else:
        tables = _tables(rows)
        for (capability, element), counts in costs.items():
            lines = [rows_tier.table(capability, element, counts)]
            for name, row in tier[capability, element].items():
                if row["problems"]:
                    lines.append(f"  {name} {', '.join(row['problems'])}")
            tables.append("\n".join(lines))
        print("\n\n".join(tables))
    all_rows = [*rows, *(row for compiled in tier.values() for row in compiled.values())]
    return 1 if any(row["problems"] for row in all_rows) else 0


def _pool(processes: int | None = None) -> Pool:
    """Processes that an interrupt of the command ends without a word of their own."""
    ignore = (signal.SIGINT, signal.SIG_IGN)
    return multiprocessing.get_context("spawn").Pool(processes, signal.signal, ignore)


def _compiled_variants(wanted: list[tuple[int, str]]) -> list[dict[str, Any]]:
    tasks = [(*one, at) for one in wanted for at in range(len(_variants(*one)))]
    with _pool() as pool:
        return list(counted(pool.imap(_compile, tasks, 4), len(tasks), "compiling variants:"))


@functools.cache
def _variants(capability: int, element: str) -> list[Variant]:
    from ..kernels import variants

    return list(variants.variants(capability, element))


def _compile(task: tuple[int, str, int]) -> dict[str, Any]:
    """A variant by its place."""
    from ..kernels import resources, tiles

    capability, element, at = task
    row = asdict(resources.read(_variants(capability, element)[at], capability))
    return _checked(row, element, tiles.CHIPS[capability].shared_memory)


def _checked(row: dict[str, Any], element: str, limit: int) -> dict[str, Any]:
    problems = [
        *(["spills"] if row["stack"] or row["local_accesses"] else []),
        *([f"more than {limit} bytes of shared memory"] * (row["shared_memory"] > limit)),
    ]
    return row | {"element": element, "problems": problems}


def _compiled_tier(wanted: tuple[int, str]) -> dict[str, dict[str, Any]]:
    # A new process, in which nothing is compiled yet, and which nothing else keeps waiting.
    with _pool(1) as pool:
        return pool.apply(_compile_anew, (wanted,))


def _compile_anew(wanted: tuple[int, str]) -> dict[str, dict[str, Any]]:
    """The kernels of the rows tier by name, none of them taken from Triton's cache."""
    import triton

    from ..kernels import resources, tiles, variants

    triton.knobs.compilation.always_compile = True
    capability, element = wanted
    by_name = {one.name: one for one in variants.variants(capability, element)}
    needed = dict.fromkeys(kernel for call in predictions.CALLS for kernel in call.kernels(element))
    read = {name: asdict(resources.read(by_name[name], capability)) for name in needed}
    limit = tiles.CHIPS[capability].shared_memory
    return {name: _checked(row, element, limit) for name, row in read.items()}


def _counts(
    wanted: tuple[int, str],
    compiled: Mapping[str, Mapping[str, Any]],
    launched: Mapping[str, tuple[int, int]],
) -> list[Counts]:
    return [predictions.counts(call, wanted[1], compiled, launched) for call in predictions.CALLS]


def _plain(
    counted: Mapping[tuple[int, str], list[Counts]],
    tier: Mapping[tuple[int, str], Mapping[str, Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """For JSON."""
    rows = []
    for (capability, element), counts in counted.items():
        compiled = tier[capability, element]
        for one in counts:
            problems = [
                f"{name} {problem}"
                for name in one.call.kernels(element)
                for problem in compiled[name]["problems"]
            ]
            rows.append({"capability": capability} | one.plain() | {"problems": problems})
    return rows


def _tables(rows: list[dict[str, Any]]) -> list[str]:
    """One for each chip and element."""
    header = (
        *("registers", "stack", "shared memory", "matrix instructions", "tensor loads"),
        "epilogue",
    )
    tables = []
    for (capability, element), part in itertools.groupby(
        rows, lambda row: (row["capability"], row["element"])
    ):
        lines = [f"sm_{capability}, {element}"]
        lines.append(f"  {'':48}" + "".join(f"{name:>21}" for name in header))
        for row in part:
            values = "".join(f"{row[name.replace(' ', '_')]:21}" for name in header)
            lines.append(f"  {row['name']:48}{values}  {', '.join(row['problems'])}")
        tables.append("\n".join(lines))
    return tables
