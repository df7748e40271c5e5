# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref architectures``: its table, its status, and, as a sweep, all of it."""

import sys

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra: fastpref[trl])")

from fastpref.architectures import comparison, sweep
from fastpref.cli import main as cli
from fastpref.integrations.causal_lm.transform import LogitTransform

# Beside those that need other inputs than ids (gemma4's assistants, musicgen) or other libraries.
LEAST_EXACT = 175


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["architectures", "--only", "llama", "lama"]) == 2
    assert "no causal language model lama;" in capsys.readouterr().err


@pytest.mark.heavy
def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, one that is built, one that falls back and one that cannot be."""
    only = ["llama", "prophetnet", "musicgen"]
    assert cli.main(["architectures", "--only", *only]) == 0
    *rows, empty, summary = capsys.readouterr().out.splitlines()
    verdicts = [row.split(maxsplit=1)[1].split("  ")[0].strip() for row in rows]
    assert [row.split()[0] for row in rows] == only
    assert verdicts == ["exact", "falls back", "cannot be built"]
    assert empty == "" and "3 architectures" in summary and "1 exact" in summary


def test_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Isolated:
        def __init__(self, *given: object) -> None:
            pass

        def ask(self, name: str, say: object) -> comparison.Result:
            return comparison.Result(name, "exact", "")

        def close(self) -> None:
            pass

    monkeypatch.setattr(sweep, "Isolated", Isolated)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["architectures", "--only", "llama", "gpt2"]) == 0
    said = capsys.readouterr().err
    assert "comparing 0 of 2: llama" in said and "1 of 2, about 10 s left: gpt2" in said


def test_a_wrong_transform_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.integrations.causal_lm import measurement

    assert comparison.compare("llama").verdict == "exact"
    wrong = LogitTransform(1.001, None, comparison.VOCABULARY)
    monkeypatch.setattr(measurement, "fit", lambda outputs, final: wrong)
    monkeypatch.setattr(measurement, "_disagreement", lambda *args: None)
    found = comparison.compare("llama")
    assert found.verdict == "differs", found


@pytest.mark.slow
def test_every_architecture() -> None:
    """None differs."""
    found = {result.name: result for result in sweep.sweep(sweep.names(), lambda name: None)}
    wrong = [one for one in found.values() if one.verdict == "differs"]
    assert wrong == []
    assert sum(one.verdict == "exact" for one in found.values()) >= LEAST_EXACT
