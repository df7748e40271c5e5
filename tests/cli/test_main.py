# SPDX-License-Identifier: Apache-2.0
"""The parser: commands, help, errors, and that only the command asked for is imported."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fastpref
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
    [
        (["fly"], "invalid choice: 'fly'"),
        (["bnech"], "did you mean 'bench'?"),
        (["bench", "--model", "qwen2-5-0.5b"], "did you mean 'qwen2.5-0.5b'?"),
        (["env", "--fly"], "--fly"),
        (["--versoin"], "did you mean '--version'?"),
    ],
)
def test_misuse_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["env", "--jsn"], "unrecognized arguments: --jsn; did you mean '--json'?"),
        (["bench", "--lenght=5", "--quick"], "--lenght=5; did you mean '--length'?"),
        (["bench", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_an_unknown_option_is_of_its_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.split("error: ")
    assert f"fastpref {arguments[0]} [-h]" in usage
    assert said in error
    assert ("did you mean" in error) == ("did you mean" in said)


def test_without_arguments_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "usage:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"fastpref {fastpref.__version__}"


def _started(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """In a session of its own, as a terminal's foreground."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastpref", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whatever is started in the background of a shell ignores it, and passes that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def _family(pid: int) -> set[int]:
    """Processes of the session that ``pid`` leads."""
    found = subprocess.run(["ps", "-o", "pid=", "-s", str(pid)], capture_output=True, text=True)
    return {int(one) for one in found.stdout.split()}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["from the terminal", "alone"])
def test_an_interrupt_is_one_line_and_leaves_no_child(whole: bool) -> None:
    """While processes of its own compare models."""
    process = _started("architectures", "--only", "gpt2", "llama", stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()  # the first model
    assert len(_family(process.pid)) > 1
    (os.killpg if whole else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert [line for line in said.splitlines() if line] == ["interrupted"]
    end = time.monotonic() + 60  # multiprocessing's tracker of resources goes once it is alone
    while _family(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _family(process.pid)


@pytest.mark.parametrize(
    "before",
    ["raise KeyboardInterrupt", "atexit.register(print, 'later')\nraise KeyboardInterrupt"],
    ids=["at once", "nothing waits"],
)
def test_an_interrupt_while_libraries_are_imported(tmp_path: Path, before: str) -> None:
    (tmp_path / "torch.py").write_text(f"import atexit\n{before}\n")
    process = _started(
        "objectives", stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": _path(tmp_path)}
    )
    assert process.communicate(timeout=120) == ("", "\ninterrupted\n")
    assert process.returncode == 130


def _path(first: Path) -> str:
    return os.pathsep.join(map(str, (first, *filter(None, [os.environ.get("PYTHONPATH")]))))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("objectives",), id="more than a buffer"),
        pytest.param((), id="less"),  # which is written at the end
        pytest.param(("--version",), id="by the parser"),
    ],
)
def test_a_closed_pipe_is_no_traceback(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    # As it is for users: with a buffer.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = _started(*arguments, stdout=write, env=env)
    os.close(write)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (141, "")


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
