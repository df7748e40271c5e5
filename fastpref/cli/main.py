# SPDX-License-Identifier: Apache-2.0
"""The parser of ``python -m fastpref``; it imports only the module of the command asked for.

A command ``name`` is the module ``fastpref.cli.name`` with ``add_parser(subparsers)``, which adds
the parser of that name, and ``run(args)``, which returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "env": "what this installation can do, and why it cannot do the rest",
    "demo": "a preference training inside TRL, stock against fastpref",
    "diagnose": "what a preference training has done to a model, as a report",
    "objectives": "every objective with its formula, its paper and what it needs",
    "architectures": "which models of transformers fuse_lm_head is exact for",
    "kernels": "registers, shared memory and matrix instructions of the Triton kernels",
    "tune": "check and time the kernels on this GPU, for backend='auto' to choose by",
    "bench": "measure fastpref against the alternatives",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. ``argv`` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m fastpref", description="Fused preference losses."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    asked = next((word for word in arguments if not word.startswith("-")), None)
    module = None
    for name, summary in COMMANDS.items():
        if name == asked:
            module = importlib.import_module(f"fastpref.cli.{name}")
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary, add_help=False)
    args = parser.parse_args(arguments)
    if module is None:
        parser.error(f"unknown command {args.command!r}")
    return int(module.run(args))
