# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref kernels``: what the Triton kernels take of each chip.

They are compiled here for chips that need not be; nothing runs. All variants of all chips take a
core most of an hour.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

CAPABILITIES = (80, 90, 100, 120)
ELEMENTS = ("bf16", "fp16", "fp32")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "kernels", help="registers, shared memory and matrix instructions of the Triton kernels"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
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
    with ProcessPoolExecutor() as pool:
        rows = [row for part in pool.map(_compile, wanted) for row in part]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _print(rows)
    return 1 if any(row["problems"] for row in rows) else 0


def _compile(wanted: tuple[int, str]) -> list[dict[str, Any]]:
    from ..kernels import resources, tiles

    capability, element = wanted
    rows = []
    for variant in resources.variants(capability, element):
        row = asdict(resources.read(variant, capability)) | {"element": element}
        limit = tiles.CHIPS[capability].shared_memory
        row["problems"] = [
            *(["spills"] if row["stack"] or row["local_accesses"] else []),
            *([f"more than {limit} bytes of shared memory"] * (row["shared_memory"] > limit)),
        ]
        rows.append(row)
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
