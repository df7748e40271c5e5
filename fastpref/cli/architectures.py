# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref architectures``: which models of transformers a fused head is exact for."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

from ..objectives.checks import hint
from .progress import Parts, clear


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "architectures", help="a tiny model of every causal LM of transformers with its head fused"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these alone, by transformers' model type"
    )


def run(args: argparse.Namespace) -> int:
    """1 where a fused head differs from full logits, 2 for a name that transformers does not
    have."""
    try:
        import transformers
    except ImportError as error:
        print(
            f'architectures: transformers cannot be imported: {error}; pip install "fastpref[trl]"',
            file=sys.stderr,
        )
        return 2
    from ..architectures.sweep import names, sweep

    known = names()
    unknown = [name for name in args.only or () if name not in known]
    if unknown:
        print(
            f"architectures: transformers {transformers.__version__} has no causal language model "
            f"{', '.join(unknown)}{hint(unknown[0], known)}; without --only the command lists "
            "those it has",
            file=sys.stderr,
        )
        return 2
    wanted = args.only or known
    width = max(map(len, wanted))
    counts: Counter[str] = Counter()
    for result in sweep(wanted, Parts(len(wanted), "comparing ").begin):
        clear()
        counts[result.verdict] += 1
        print(f"{result.name:{width}}  {result.verdict:15}  {result.detail}", flush=True)
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    print(f"\ntransformers {transformers.__version__}, {len(wanted)} architectures: {listed}")
    return 1 if counts["differs"] else 0
