# SPDX-License-Identifier: Apache-2.0
"""The table and the picture of the comparison, and what a failed process says."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("trl")

from fastpref.demo.compare import (
    HEADS,
    Measured,
    _job,
    _run_one,
    largest_difference,
    picture,
    run,
    table,
)
from fastpref.demo.data import Example
from fastpref.demo.model import save
from fastpref.demo.recipe import Recipe
from fastpref.demo.worker import train

MIB = 1 << 20
RESULTS = {
    "stock": Measured([0.7, 0.6], [9.0, 3.0, 4.0], [9.0, 1.5, 2.0], 100 * MIB, 400 * MIB),
    "fastpref": Measured([0.7, 0.5], [9.0, 1.0, 1.0], [9.0, 0.5, 0.5], 100 * MIB, 200 * MIB),
}


def test_times_are_those_of_the_fastest_step():
    assert (RESULTS["stock"].step, RESULTS["stock"].head) == (3.0, 1.5)


def test_table_has_both_sides_and_their_ratio():
    lines = table(RESULTS, "TRL 9")
    words = [line.split() for line in lines]
    assert "TRL 9" in lines[0]
    assert words[1][-5:] == ["1500.0", "ms", "500.0", "ms", "3.00x"]
    assert words[2][-5:] == ["3000.0", "ms", "1000.0", "ms", "3.00x"]
    assert words[3][-5:] == ["400.0", "MiB", "200.0", "MiB", "2.00x"]
    assert words[4][-5:] == ["300.0", "MiB", "100.0", "MiB", "3.00x"]
    assert float(words[5][-1]) == pytest.approx(0.1) == largest_difference(RESULTS)


def test_picture_is_a_png_under_its_title(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.suptitle", lambda figure, text, **_: titles.append(text)
    )
    picture(RESULTS, "TRL 9", "under a loss", tmp_path / "loss.png")
    assert titles == ["under a loss"]
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.heavy
@pytest.mark.parametrize("objective", ["dpo", pytest.param("ipo", marks=pytest.mark.slow)])
def test_job_survives_json_and_is_done_alike_with_both_heads(tiny, lists, tmp_path, objective):
    """Of lists the best against the worst completion, whatever columns there are."""
    save(*tiny, tmp_path)
    examples = [replace(example, numbers={"reward_margin": 1.5}) for example in lists]
    recipe = Recipe(warm_up_steps=0, steps=3, batch=16, rate=1e-3)
    losses = {}
    for head in HEADS:
        job = json.loads(json.dumps(_job(tmp_path, examples, objective, recipe, head)))
        assert [e["completions"] for e in job["examples"]] == [
            list(e.completions) for e in examples
        ]
        measured = Measured(**train(job, tmp_path))
        assert len(measured.losses) == len(measured.step_seconds) == 3
        losses[head] = measured.losses
    assert losses["fastpref"] == pytest.approx(losses["stock"], rel=1e-5)
    assert losses["stock"][0] > losses["stock"][-1]


@pytest.mark.slow
@pytest.mark.heavy
def test_failed_process_raises_with_its_last_words(tmp_path):
    recipe = Recipe(warm_up_steps=0, steps=1, rate=1e-3)
    with pytest.raises(RuntimeError, match=r"(?s)the stock process failed.*has no config.json"):
        run(tmp_path, [Example.pair("a", "b", "c")], "dpo", recipe, lambda head: lambda *_: None)


def test_an_interrupt_ends_the_process(tmp_path, monkeypatch):
    """One that the terminal did not send it too."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho step 1 2 0.5\nexec sleep 60\n")
    script.chmod(0o755)
    made = []

    class Kept(subprocess.Popen):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            made.append(self)

    def interrupt(step, steps, loss):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(subprocess, "Popen", Kept)
    with pytest.raises(KeyboardInterrupt):
        _run_one({"head": "stock"}, tmp_path, interrupt)
    assert made[0].wait(10) == -signal.SIGKILL
