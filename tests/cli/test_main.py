# SPDX-License-Identifier: Apache-2.0
"""The parser: commands, help, errors, and that only the command asked for is imported."""

import importlib
import sys

import pytest

from fastpref.cli import main as cli


def test_every_command_is_a_module_with_a_parser() -> None:
    for name in cli.COMMANDS:
        module = importlib.import_module(f"fastpref.cli.{name}")
        assert callable(module.add_parser)
        assert callable(module.run)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name, summary in cli.COMMANDS.items():
        assert name in out
        assert summary.split()[0] in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "required: command"), (["fly"], "invalid choice: 'fly'"), (["env", "--fly"], "--fly")],
)
def test_misuse_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.heavy
def test_only_the_command_asked_for_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in cli.COMMANDS:
        monkeypatch.delitem(sys.modules, f"fastpref.cli.{name}", raising=False)
    assert cli.main(["env", "--json"]) == 0
    assert "fastpref.cli.env" in sys.modules
    assert [name for name in cli.COMMANDS if f"fastpref.cli.{name}" in sys.modules] == ["env"]
    assert capsys.readouterr().out.startswith("{")
