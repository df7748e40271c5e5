# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref objectives``."""

import pytest

from fastpref import objectives
from fastpref.cli import objectives as command
from fastpref.cli.main import main


def test_every_objective_has_its_formula_and_its_paper() -> None:
    rows = [row for family in command.tables().values() for row in family]
    assert sorted(row.name for row in rows) == sorted(objectives.names())
    without_formula = [row.name for row in rows if not row.loss]
    without_paper = [row.name for row in rows if not row.paper]
    assert without_formula == []
    assert without_paper == ["sft"]
    assert all(80 >= len(row.loss.split("; ")[0]) for row in rows)
    simpo = next(row for row in rows if row.name == "simpo")
    assert simpo.loss == "softplus(-m) + eps m; m = beta (sbar_w - sbar_l) - gamma"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in objectives.names())
    assert "needs reference, chosen_lengths\N{DEGREE SIGN}" in printed
    assert "Rafailov et al. 2023, arXiv:2305.18290" in printed
    assert "w marks the chosen and l the rejected" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) < 160


def test_one_objective(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives", "dpo"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dpo(\n    policy_chosen_logps: Tensor,\n")
    assert "    beta: float = 0.1,\n" in printed and ") -> PairLosses" in printed
    assert "arXiv:2305.18290" in printed and "Letters: x is the log-ratio" in printed
    assert main(["objectives", "dop"]) == 2
    assert "no objective is called 'dop'; perhaps dpo" in capsys.readouterr().err
