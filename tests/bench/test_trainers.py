# SPDX-License-Identifier: Apache-2.0
"""Whole trainings, stock beside fastpref: what is measured, and what is said of it."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from fastpref.bench import report
from fastpref.bench.trainers import runs

TINY = {**runs.QUICK, "steps": 3, "hidden": 32, "layers": 1, "max_length": 48}
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_pairs.jsonl"


def measured(method, adapters=False, pairs=None, **changes):
    training = runs.Training(method=method, adapters=adapters, **{**TINY, **changes})
    row = runs.measure(training, pairs)
    assert json.loads(json.dumps(row)) == row
    return row


def check(row):
    assert row["difference"] < 1e-4
    assert row["first_loss"] != row["last_loss"]
    for side in ("stock", "fastpref"):
        own = row[side]
        assert 0 < own["head"] < own["step"]
        assert own["peak"] > 0


@pytest.mark.heavy
@pytest.mark.slow
def test_a_training_is_the_same_on_both_sides():
    row = measured("dpo", adapters=True)
    check(row)
    assert row["pairs"] == "arithmetic"
    text = report.terminal_trainings([row])
    assert "dpo, LoRA: losses within" in text
    assert f"{row['stock']['step'] / row['fastpref']['step']:.2f}x" in text


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo", "tpo"])
def test_every_method(method):
    check(measured(method))


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="no such data beside the checkout")
def test_pairs_of_a_file():
    row = measured("orpo", pairs=GSM8K, max_length=256)
    check(row)
    assert row["pairs"] == "gsm8k_pairs.jsonl"
    with pytest.raises(RuntimeError, match="no pair has fewer than 24 tokens"):
        measured("orpo", pairs=GSM8K, max_length=24)


@pytest.mark.heavy
@pytest.mark.parametrize("method, name", [("dpo", "DPOTrainer"), ("orpo", "FastORPOTrainer")])
def test_one_side_is_on_fastpref(tmp_path, method, name):
    from fastpref.bench.trainers.methods import make_trainer
    from fastpref.demo.data import load
    from fastpref.integrations import trl as integration

    def found():
        return vars(integration.trl_utils())["_ChunkedLogProbFunction"]

    integration.unpatch()
    own, examples = found(), load(None).examples[:20]
    training = runs.Training(method=method, adapters=True, **TINY)
    try:
        stock = make_trainer(training, examples, False, tmp_path)
        assert type(stock).__name__ == name.removeprefix("Fast") and found() is own
        ours = make_trainer(training, examples, True, tmp_path)
        assert type(ours).__name__ == name and found() is not own
    finally:
        integration.unpatch()


@pytest.mark.slow
@pytest.mark.heavy
def test_a_process_that_fails_says_why(tmp_path):
    training = runs.Training(method="dpo", adapters=False, **TINY)
    with pytest.raises(RuntimeError, match=r"failed:(.|\n)*nothing\.jsonl"):
        runs.measure(training, tmp_path / "nothing.jsonl")


def test_trainings_are_those_of_the_report():
    names = [one.name for one in runs.trainings({})]
    assert names[:2] == ["dpo, LoRA", "dpo, all parameters"] and len(set(names)) == 5
    small = next(iter(runs.trainings(runs.QUICK)))
    assert dataclasses.asdict(small) | runs.QUICK == dataclasses.asdict(small)
