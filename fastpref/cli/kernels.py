# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref kernels``: what the Triton kernels take of each chip.

They are compiled here for chips that need not be; nothing runs. All variants of all chips take a
core most of an hour; those of the rows tier alone (``--rows``) some minutes.

Of the rows tier also what a call costs, counted, and what follows from that for an H100 and an
H200, a prediction beside what is aimed at.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

from ..bench import launches, predictions
from ..bench.predictions import Counts
from . import rows_tier

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
        with ProcessPoolExecutor() as pool:
            rows = [row for part in pool.map(_compile, wanted) for row in part]
    tier = {one: _compiled_tier(one) for one in wanted}
    launched = launches.measured()["rows"]
    counted = {one: _counts(one, compiled, launched) for one, compiled in tier.items()}
    if args.json:
        print(json.dumps({"kernels": rows, "rows tier": _plain(counted, tier)}, indent=1))
    else:
        _print(rows)
        for (capability, element), counts in counted.items():
            print(f"\n{rows_tier.table(capability, element, counts)}")
            for name, row in tier[capability, element].items():
                if row["problems"]:
                    print(f"  {name} {', '.join(row['problems'])}")
    all_rows = [*rows, *(row for compiled in tier.values() for row in compiled.values())]
    return 1 if any(row["problems"] for row in all_rows) else 0


def _compile(wanted: tuple[int, str]) -> list[dict[str, Any]]:
    from ..kernels import resources, tiles, variants

    capability, element = wanted
    read = (resources.read(one, capability) for one in variants.variants(capability, element))
    return [_checked(asdict(one), element, tiles.CHIPS[capability].shared_memory) for one in read]


def _checked(row: dict[str, Any], element: str, limit: int) -> dict[str, Any]:
    problems = [
        *(["spills"] if row["stack"] or row["local_accesses"] else []),
        *([f"more than {limit} bytes of shared memory"] * (row["shared_memory"] > limit)),
    ]
    return row | {"element": element, "problems": problems}


def _compiled_tier(wanted: tuple[int, str]) -> dict[str, dict[str, Any]]:
    # A new process, in which nothing is compiled yet, and which nothing else keeps waiting.
    with ProcessPoolExecutor(1) as pool:
        (compiled,) = pool.map(_compile_anew, [wanted])
    return compiled


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


def _print(rows: list[dict[str, Any]]) -> None:
    header = (
        *("registers", "stack", "shared memory", "matrix instructions", "tensor loads"),
        "epilogue",
    )
    for (capability, element), part in itertools.groupby(
        rows, lambda row: (row["capability"], row["element"])
    ):
        print(f"\nsm_{capability}, {element}")
        print(f"  {'':48}" + "".join(f"{name:>21}" for name in header))
        for row in part:
            values = "".join(f"{row[name.replace(' ', '_')]:21}" for name in header)
            print(f"  {row['name']:48}{values}  {', '.join(row['problems'])}")
