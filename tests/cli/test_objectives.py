# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref objectives``."""

import re

import pytest

from fastpref import objectives
from fastpref.cli import objectives as command
from fastpref.cli.main import main
from fastpref.objectives.documentation import SYMBOLS, SYMBOLS_OF_GROUPS

REQUIRED = {"dpo_shift": {"shift": 0.5}, "dr_grpo": {"max_completion_length": 8}}
# Of formulas: what any reader of one knows, and the words between.
MATHEMATICS = {
    *("Bernoulli", "KL", "atan", "clip", "cos", "e", "exp", "log", "log2", "max", "min", "pi"),
    *("mean", "rank", "sigmoid", "softmax", "sort", "sum"),
}
WORDS = set(
    "all and batch best by default deviation each else first for given gradient if in it its "
    "labels lengths made needed no not number of or order over pairs policy prompt prompts "
    "reference response responses reversed the those to tokens vocabulary where whole with "
    "without".split()
)


def test_every_objective_has_its_formula_and_its_paper() -> None:
    rows = [row for family in command.tables().values() for row in family]
    assert sorted(row.name for row in rows) == sorted(objectives.names())
    without_formula = [row.name for row in rows if not row.loss]
    without_paper = [row.name for row in rows if not row.paper]
    assert without_formula == []
    assert without_paper == []
    assert [row.name for row in rows if not row.authors] == []
    assert not any("``" in row.loss or "  " in row.loss for row in rows)
    assert all(80 >= len(row.loss.split("; ")[0]) for row in rows)
    simpo = next(row for row in rows if row.name == "simpo")
    assert simpo.loss == "softplus(-m) + eps m; m = beta (sbar_w - sbar_l) - gamma"


def names_of(formula: str) -> set[str]:
    """All names in it, without what is quoted; a subscript belongs to its name."""
    unquoted = re.sub(r'"[^"]*"(?:, \w+)?', "", formula)
    return set(re.findall(r"[A-Za-z][A-Za-z0-9]*(?:_(?:[A-Za-z]+|[+-]))*'?", unquoted))


def stems(name: str) -> set[str]:
    """What may define a name: itself, or what is before a subscript of it."""
    parts = name.split("_")
    return {"_".join(parts[:end]) for end in range(1, len(parts) + 1)}


def test_every_name_of_a_formula_is_defined() -> None:
    undefined = {}
    for unit, rows in command.tables().items():
        symbols = SYMBOLS | (SYMBOLS_OF_GROUPS if unit == "token" else {})
        letters = {re.split(r"[(\[]", one)[0] for names in symbols for one in names.split(", ")}
        for row in rows:
            signature = objectives.get(row.name, **REQUIRED.get(row.name, {})).signature
            arguments = {*signature.logps, *signature.extras, *signature.hyperparameters}
            beside = set(re.findall(r"([A-Za-z][\w+-]*'?)(?:\(\w\))? =(?!=)", row.loss))
            known = letters | arguments | beside | MATHEMATICS | WORDS
            unknown = {one for one in names_of(row.loss) if not stems(one) & known}
            if unknown:
                undefined[row.name] = unknown
    assert undefined == {}


def test_a_loss_written_twice_is_listed_once() -> None:
    documentation = "Of two.\n\n    loss = f(m)\n         = g\n    f = a,\n        b\n"
    formula, _ = command._formula_and_paper(documentation)
    assert formula == "f(m); f = a, b"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in objectives.names())
    assert "needs reference, chosen_lengths\N{DEGREE SIGN}" in printed
    assert "Rafailov et al. 2023, arXiv:2305.18290" in printed
    assert "w, l mark the chosen and the rejected" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) < 160
    assert '"truncated_square") or 1 / (1 + e^m)^2 ("savage")' in " ".join(printed.split())


def test_one_objective(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives", "dpo"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dpo(\n    policy_chosen_logps: Tensor,\n")
    assert "    beta: float = 0.1,\n" in printed and ") -> PairLosses" in printed
    assert "arXiv:2305.18290" in printed and "Letters: x is the log-ratio" in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dop", "no objective is called 'dop'; perhaps dpo"),
        ("", "no objective is called ''; `fastpref objectives` lists them\n"),
        ("xyz", "no objective is called 'xyz'; `fastpref objectives` lists them\n"),
        ("wpo", "wpo weighs another objective: help(fastpref.objectives.wpo)\n"),
        ("combine", "combine adds objectives up: help(fastpref.objectives.combine)\n"),
    ],
)
def test_what_is_no_objective(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives", name]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"objectives: {message}")
    assert "names()" not in printed and len(printed) < 100
