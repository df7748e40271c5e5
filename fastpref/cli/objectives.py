# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref objectives``: the catalogue, or one objective of it."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from typing import Any, NamedTuple

FAMILIES = {
    "pair": "Pairs",
    "unit": "Single responses",
    "list": "Ranked lists",
    "token": "Groups of sampled responses",
}


class Row(NamedTuple):
    """One objective of the table."""

    name: str
    loss: str
    paper: str
    scope: str
    needs: str


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "objectives", help="every objective with its formula, its paper and what it needs"
    )
    parser.add_argument("name", nargs="?", help="show one objective in full")
    parser.add_argument("--markdown", action="store_true", help="as tables in Markdown")


def run(args: argparse.Namespace) -> int:
    """2 where there is no objective of that name."""
    from .. import objectives

    if args.name is None:
        print(markdown() if args.markdown else _plain())
        return 0
    if args.name not in objectives.names():
        try:
            objectives.get(args.name)
        except ValueError as error:
            print(f"objectives: {error}", file=sys.stderr)
        return 2
    function = getattr(objectives, args.name)
    print(f"{args.name}{inspect.signature(function, eval_str=False)}\n")
    print(inspect.getdoc(function))
    return 0


def tables() -> dict[str, list[Row]]:
    """The catalogue by family."""
    from ..objectives import registry

    found: dict[str, list[Row]] = {family: [] for family in FAMILIES}
    for objective in registry.catalogue():
        needs = ["reference"] if objective.needs_reference else []
        # ° as in the docstrings: preference_loss fills it in.
        needs += [
            name + ("\N{DEGREE SIGN}" if facts.filled else "")
            for name, facts in objective.extras.items()
            if facts.required or facts.filled
        ]
        loss, paper = _formula_and_paper(inspect.getdoc(objective.function) or "")
        row = Row(objective.name, loss, paper, objective.scope, ", ".join(needs))
        found[objective.unit].append(row)
    return found


def _formula_and_paper(documentation: str) -> tuple[str, str]:
    """Of a docstring: the line ``loss = ...``, with what the lines beside it define as far as there
    is room, and the first arXiv number."""
    block = re.search(r"(?:^ {4}.*\n?)*^ {4}loss = .*(?:\n {4}.*)*", documentation, re.MULTILINE)
    lines = [line.strip() for line in block[0].splitlines()] if block else []
    formula = next((line.removeprefix("loss = ") for line in lines if "loss = " in line), "")
    for line in lines:
        if " = " in line and not line.startswith("loss") and len(formula) + len(line) < 130:
            formula += "; " + line
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", documentation)
    return " ".join(formula.split()), (paper[1] if paper else "")


def markdown() -> str:
    """One table a family."""
    parts = []
    for family, rows in tables().items():
        lines = [f"**{FAMILIES[family]}**", "", "| name | loss | paper | scope | needs |"]
        lines.append("|---|---|---|---|---|")
        for row in rows:
            paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
            loss = row.loss.replace("|", "\\|")
            lines.append(f"| `{row.name}` | {loss} | {paper} | {row.scope} | {row.needs} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _plain() -> str:
    lines = []
    for family, rows in tables().items():
        lines += [FAMILIES[family], ""]
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            lines.append(f"  {row.name:{width}}  {row.scope:7}  {row.loss}")
            if row.needs:
                lines.append(f"  {'':{width}}  {'':7}  needs {row.needs}")
        lines.append("")
    return "\n".join(lines[:-1])
