# SPDX-License-Identifier: Apache-2.0
"""The parser of the command ``fastpref``, which is ``python -m fastpref`` too; it imports only the
module of the command asked for.

A command ``name`` is the module ``fastpref.cli.name`` with ``add_parser(subparsers)``, which adds
the parser of that name, and ``run(args)``, which returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__

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
# As a shell has them of what a signal ended.
INTERRUPTED, PIPE_CLOSED = 130, 141


class Parser(argparse.ArgumentParser):
    """Names what is nearest to a wrong choice or option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but nothing is left unknown: the parser of the command that was given an
        option says that it has none such, not the parser of all commands."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            hint = self._hint(option, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found is not None:
            message += self._hint(found[1], [one.strip(" '") for one in found[2].split(",")])
        super().error(message)

    @staticmethod
    def _hint(wrong: str, known: Iterable[str]) -> str:
        # Without the dashes, which all options share.
        bare = {one.lstrip("-"): one for one in known}
        nearest = get_close_matches(wrong.lstrip("-"), bare, n=1)
        return f"; did you mean {bare[nearest[0]]!r}?" if nearest else ""


def command() -> NoReturn:
    """``main`` of a process, which it ends."""
    status = main()
    if status == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the libraries' own endings take seconds
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. ``argv`` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            status = _run(arguments)
        finally:  # the parser leaves by SystemExit
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still in the buffer would raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return status


def _run(arguments: Sequence[str]) -> int:
    installed = Path(sys.argv[0]).stem == "fastpref"
    parser = Parser(
        prog="fastpref" if installed else "python -m fastpref",
        description="Fused preference losses.",
    )
    parser.add_argument("--version", action="version", version=f"fastpref {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
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
        parser.print_help()
        return 0
    return int(module.run(args))
