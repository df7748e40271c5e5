# SPDX-License-Identifier: Apache-2.0
"""The command: its table, what it stores and forgets, its exit codes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.cli import tune
from fastpref.scoring.backends import verdict, verdict_files
from fastpref.tuning import checks
from tests.tuning.settings import TIERS, shrink
from tests.tuning.test_judge import InProcess, Lost, Script

KEY = {"device": "a card", "driver": "1"}
HEAD = ("--hidden-size", "16", "--vocab-size", "300")


def run(*given: str) -> int:
    parser = argparse.ArgumentParser()
    tune.add_parser(parser.add_subparsers())
    return tune.run(parser.parse_args(["tune", *given]))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for remembered in (verdict.stored, verdict_files.warn):
        remembered.cache_clear()
    monkeypatch.setenv("FASTPREF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiers that run here, in this process."""
    with monkeypatch.context() as patch:
        shrink(patch)
        patch.setattr(tune, "DEVICE", "cpu")
        patch.setattr(tune, "TIERS", TIERS)
        patch.setattr(tune, "Isolated", lambda *given: InProcess())
        patch.setattr(verdict, "key_of", lambda index: KEY)
        yield
    checks._expected.cache_clear()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "Isolated", lambda *given: made)
    monkeypatch.setattr(verdict, "key_of", lambda index: KEY)
    return made


def test_from_the_command_to_the_choice(
    cpu: None, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    assert run(*HEAD, "--dtype", "bfloat16", "--dtype", "float16") == 0
    stored = verdict_files.read(KEY)
    assert {(one.dtype, one.heavy) for one in stored} == {
        (dtype, heavy) for dtype in ("bfloat16", "float16") for heavy in (False, True)
    }
    assert {(one.hidden_size, one.vocab_size) for one in stored} == {(16, 300)}
    said, told = capsys.readouterr()
    assert f"stored in {cache}" in told
    lines = said.splitlines()
    for name in checks.CHECKS:
        rows = [line.split() for line in lines if line.startswith(f"  {name:<36}")]
        assert [row[-3] for row in rows] == [*TIERS, *TIERS]
        assert all(float(row[-2]) <= float(row[-1]) for row in rows)
    for name in ("1u, scores", "3u, trainable, with statistics"):
        rows = [line.split() for line in lines if line.startswith(f"  {name:<36}")]
        assert [row[-2] for row in rows] == [*TIERS, *TIERS]
        assert all(float(row[-1]) > 0 for row in rows)
    assert sum(line.startswith("  verdict: ") for line in lines) == 4


def test_what_auto_makes_of_it(script: Script) -> None:
    from fastpref.scoring.backends.choice import Size

    assert run(*HEAD) == 0
    size = Size(torch.bfloat16, 10, 16, 300)
    assert verdict.verdict(torch.device("cuda", 0), size) == "triton"
    script.speed["triton"] = 2.0
    assert run(*HEAD) == 0
    verdict.stored.cache_clear()
    assert verdict.verdict(torch.device("cuda", 0), size) == "rows"


def test_as_json(script: Script, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    script.trouble["rows", "kept"] = Lost("rows", "its process died")
    assert run(*HEAD, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["key"] == KEY and Path(found["stored"]).parent == cache
    (one,) = found["findings"]
    assert one["setting"]["hidden_size"] == 16
    assert one["left_out"] == {"rows": {"in": "kept", "reason": "its process died"}}
    assert one["errors"]["plain"]["rows"]["error"] == 0.5
    assert [each["tier"] for each in one["verdicts"]] == ["triton", "triton"]


@pytest.mark.parametrize(
    "trouble, where, said",
    [
        (Lost("triton", "its process died"), "kept", "its process died"),
        (Lost("triton", "no answer for 45 s"), "2u, frozen head", "no answer for 45 s"),
        (checks.Error("d weight, rms", 2.0, 1.0), "kept", "WRONG, d weight, rms"),
    ],
)
def test_a_tier_that_fails_is_named(
    script: Script, capsys: pytest.CaptureFixture[str], trouble: Any, where: str, said: str
) -> None:
    script.trouble["triton", where] = trouble
    assert run(*HEAD) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("triton" in line and said in line for line in lines)
    assert any(line.startswith(f"  triton is left out, in {where!r}: ") for line in lines)
    assert "  verdict: rows for bfloat16 H=16 plain" in lines
    assert {one.tier for one in verdict_files.read(KEY)} == {"rows"}


def test_how_far_it_is(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts are counted."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert run(*HEAD, "--dtype", "bfloat16", "--dtype", "float16") == 0
    said = [one for one in capsys.readouterr().err.split("\r\033[K") if " of " in one]
    assert said[0] == f"0 of {len(said)}: plain, rows"
    assert said[-1].startswith(f"{len(said) - 1} of {len(said)}, about 10 s left: ")


def test_no_tier_is_left(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor what an earlier run had found."""
    assert run(*HEAD) == 0
    script.trouble |= {(tier, "plain"): Lost(tier, "gone") for tier in ("rows", "triton")}
    assert run(*HEAD) == 1
    assert "no tier is left: train with ScoringOptions(backend='torch')" in capsys.readouterr().out
    assert verdict_files.read(KEY) == ()


def test_what_cannot_be_decided_changes_nothing(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*HEAD) == 0
    before = verdict_files.read(KEY)
    script.trouble["rows", "plain"] = Lost("rows", "OutOfMemoryError: CUDA out of memory")
    assert run(*HEAD) == 1
    assert "free it of other processes" in capsys.readouterr().err
    assert verdict_files.read(KEY) == before != ()
    assert script.closed == 2


def test_a_verdict_that_cannot_be_stored(
    script: Script,
    capsys: pytest.CaptureFixture[str],
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache.write_text("a file where a folder should be")
    assert run(*HEAD) == 0
    assert "verdict: triton for bfloat16" in capsys.readouterr().out
    (said,) = [one.getMessage() for one in caplog.records]
    assert said.startswith("the verdict is not stored:") and "set FASTPREF_CACHE_DIR" in said
    assert run(*HEAD, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stored"] is None


def test_show_and_forget(script: Script, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert run("--show") == 0 and run("--forget") == 0
    said = capsys.readouterr().out
    assert str(cache) in said and "there is nothing to forget" in said
    run(*HEAD)
    capsys.readouterr()
    assert run("--show") == 0
    said = capsys.readouterr().out
    assert "device a card" in said
    assert "triton for bfloat16 H=16 plain (1u, scores rows 1000.000 ms, triton 500.000 ms" in said
    assert run("--show", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["verdicts"][1]["heavy"] is True
    assert run("--forget", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert verdict_files.everything() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "qwen2.5-7b") == 1
    assert "finds no NVIDIA GPU; run this where training runs" in capsys.readouterr().err
    assert run("--show") == 0 and run("--forget") == 0


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("--hidden-size", "16"),
        ("--vocab-size", "300"),
        ("--model", "tiny", *HEAD),
        ("--model", "tiny", "--from", "."),
        ("--from", ".", "--vocab-size", "300"),
    ],
)
def test_one_head_is_wanted(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*given) == 2
    assert "give one of --model NAME, --from DIR, or" in capsys.readouterr().err


def test_sizes_must_be_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("--hidden-size", "0", "--vocab-size", "3") == 2
    assert "--hidden-size must be at least 1, got 0" in capsys.readouterr().err
    assert run("--hidden-size", "3", "--vocab-size", str(2**31)) == 2
    assert "--vocab-size must be at most 2147483647, got 2147483648" in capsys.readouterr().err
    assert run("--from", str(tmp_path)) == 2
    said = f"tune: --from {tmp_path}: {tmp_path}/config.json cannot be read"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, expected",
    [
        (("--model", "qwen2.5-7b"), (3584, 152064)),
        (HEAD, (16, 300)),
    ],
)
def test_whose_head(script: Script, given: tuple[str, ...], expected: tuple[int, int]) -> None:
    assert run(*given) == 0
    assert {(one.hidden_size, one.vocab_size) for one in verdict_files.read(KEY)} == {expected}


def test_from_a_model(script: Script, tmp_path: Path) -> None:
    config = {"text_config": {"hidden_size": 24, "vocab_size": 500}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("--from", str(tmp_path)) == 0
    assert {(one.hidden_size, one.vocab_size) for one in verdict_files.read(KEY)} == {(24, 500)}
