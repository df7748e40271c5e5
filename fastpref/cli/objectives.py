# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref objectives``: the catalogue, or one objective of it."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from typing import Any, NamedTuple

from ..objectives.documentation import LETTERS

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
    paper: str  # arXiv number
    authors: str  # and year
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
    from ..objectives import registry

    if args.name is None:
        print(markdown() if args.markdown else _plain())
        return 0
    if args.name not in objectives.names():
        message = registry.unknown(args.name, "`fastpref objectives` lists them")
        print(f"objectives: {message}", file=sys.stderr)
        return 2
    function = getattr(objectives, args.name)
    print(_call(args.name, inspect.signature(function)))
    print(f"\n{inspect.getdoc(function)}\n")
    print("\n".join(textwrap.wrap(f"Letters: {LETTERS}", 92)))
    return 0


def _call(name: str, signature: inspect.Signature) -> str:
    """An argument a line."""
    lines = [f"{name}("]
    kind = None
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and kind is not one.KEYWORD_ONLY:
            lines.append("    *,")
        kind = one.kind
        lines.append(f"    {one},".replace("torch.Tensor", "Tensor"))
    returned = inspect.formatannotation(signature.return_annotation).rpartition(".")[2]
    return "\n".join([*lines, f") -> {returned}"])


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
        documentation = inspect.getdoc(objective.function) or ""
        loss, paper = _formula_and_paper(documentation)
        authors = _authors(documentation)
        row = Row(objective.name, loss, paper, authors, objective.scope, ", ".join(needs))
        found[objective.unit].append(row)
    return found


def _formula_and_paper(documentation: str) -> tuple[str, str]:
    """Of a docstring: the line ``loss = ...`` with what the lines beside it define, and the first
    arXiv number."""
    block = re.search(r"(?:^ {4}.*\n?)*^ {4}loss = .*(?:\n {4}.*)*", documentation, re.MULTILINE)
    formula, definitions = "", ""
    for line in block[0].splitlines() if block else []:
        text = " ".join(line.split())
        if text.startswith("loss = "):
            formula = text.removeprefix("loss = ")
        elif not line.startswith(" " * 5):
            definitions += f"; {text}"
        elif not text.startswith("= "):  # or it is the same loss, written otherwise
            definitions += f" {text}"
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", documentation)
    return formula + definitions, (paper[1] if paper else "")


def _authors(documentation: str) -> str:
    """Of the paper whose arXiv number comes first, with the year, as far as the docstring has them
    before it."""
    named = r"((?:[A-Z][\w'’-]+ )+(?:et al\. )?\d{4})"
    before = re.split(r"arXiv:", " ".join(documentation.split()), maxsplit=1)[0]
    found = re.findall(named, before)
    return found[-1] if found else ""


def markdown() -> str:
    """One table a family."""
    parts = []
    for family, rows in tables().items():
        lines = [f"**{FAMILIES[family]}**", "", "| name | loss | paper | scope | needs |"]
        lines.append("|---|---|---|---|---|")
        for row in rows:
            paper = f"[{_paper(row)}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
            loss = row.loss.replace("|", "\\|")
            lines.append(f"| `{row.name}` | {loss} | {paper} | {row.scope} | {row.needs} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _paper(row: Row) -> str:
    return f"{row.authors}, {row.paper}" if row.authors else row.paper


def _plain() -> str:
    lines = [*textwrap.wrap(LETTERS, 96), ""]
    lines += [
        "° preference_loss makes it where it is not given; scope is what must be known before"
    ]
    lines += ["a loss is. `fastpref objectives NAME` shows one in full.", ""]
    for family, rows in tables().items():
        lines += [FAMILIES[family], ""]
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            head = f"  {row.name:{width}}  {row.scope:7}  "
            lines += textwrap.wrap(
                row.loss, 120, initial_indent=head, subsequent_indent=" " * (len(head) + 2)
            )
            about = [row.authors] if row.authors else []
            about += [f"arXiv:{row.paper}"] if row.paper else []
            about += [f"needs {row.needs}"] if row.needs else []
            if about:
                lines.append(" " * len(head) + ", ".join(about))
        lines.append("")
    return "\n".join(lines[:-1])
