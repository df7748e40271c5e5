# SPDX-License-Identifier: Apache-2.0
"""The monitor in transformers' Trainer and in TRL's: its numbers against whole logits, where they
are logged, and what it costs."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.diagnostics import PreferenceMonitorCallback, displacement, length_bias
from tests.diagnostics.tiny import VOCABULARY, make_batch, make_model, plain_logps

transformers = pytest.importorskip("transformers")
NAMES = {
    f"monitor/{name}"
    for name in (
        "chosen_drop", "rejected_drop", "dispersion", "chosen_fell", "both_fell", "margin",
        "accuracy", "length_correlation", "length_slope", "margin_order", "ches", "seconds",
        "share",
    )
}  # fmt: skip


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.batch = make_batch(count, seed=8)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {name: one[at] for name, one in self.batch.items()}


def train(folder: Path, monitor: Any, *callbacks: Any, model: Any = None, **changes: Any) -> Any:
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 4, "logging_steps": 2,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    trainer = transformers.Trainer(
        model=make_model() if model is None else model,
        args=transformers.TrainingArguments(**arguments | changes),
        train_dataset=Rows(16),
        callbacks=[monitor, *callbacks],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.mark.heavy
@pytest.mark.parametrize("through_trainer", [False, True])
def test_numbers_in_transformers_trainer(tmp_path: Path, through_trainer: bool) -> None:
    probe, unseen = make_batch(), make_batch(3, seed=4)
    monitor = PreferenceMonitorCallback(probe, unseen=unseen, every=2, beta=0.5)
    model = make_model()
    start = copy.deepcopy(model)
    trainer = train(tmp_path, monitor, model=model)
    if through_trainer:
        monitor.trainer = trainer
    trainer.train()
    entries = [one for one in trainer.state.log_history if "monitor/margin" in one]
    assert [one["step"] for one in entries] == [2, 4]
    assert set(entries[-1]) >= NAMES
    assert ("loss" in entries[-1]) != through_trainer
    before, after = (plain_logps(one, probe).sum(1) for one in (start, model))
    others = [plain_logps(one, unseen).sum(1) for one in (start, model)]
    moved = displacement((*before.chunk(2), others[0]), (*after.chunk(2), others[1]))
    for name, value in vars(moved).items():
        assert entries[-1][f"monitor/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-3)
    chosen, rejected = (after - before).chunk(2)
    margins = 0.5 * (chosen - rejected)
    assert entries[-1]["monitor/margin"] == pytest.approx(float(margins.mean()), rel=1e-3)
    assert entries[-1]["monitor/accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    lengths = (probe["labels"][:, 1:] != -100).sum(1).chunk(2)
    bias = length_bias(margins, *lengths)
    assert entries[-1]["monitor/length_slope"] == pytest.approx(bias.slope, rel=1e-2, abs=1e-4)
    assert model.training and "forward" not in vars(model)


@pytest.mark.heavy
def test_training_is_the_same_with_it(tmp_path: Path) -> None:
    """Dropout included: a probe draws no random number of the training's."""
    weights = []
    for number in range(2):
        model = make_model(attention_dropout=0.2)
        monitors = [PreferenceMonitorCallback(make_batch(), every=1)] if number else []
        trainer = train(tmp_path, transformers.TrainerCallback(), *monitors, model=model)
        trainer.train()
        weights.append(torch.cat([one.detach().flatten() for one in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.heavy
@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_training_goes_on_from_the_same_beginning(tmp_path: Path, restored: bool) -> None:
    probe, unseen = make_batch(), make_batch(3, seed=4)
    given = {
        "save_strategy": "steps",
        "save_steps": 2,
        "restore_callback_states_from_checkpoint": restored,
    }

    def entries(resume: str | None = None) -> list[dict[str, Any]]:
        monitor = PreferenceMonitorCallback(probe, unseen=unseen, every=2)
        trainer = train(tmp_path, monitor, **given)
        trainer.train(resume_from_checkpoint=resume)
        return [one for one in trainer.state.log_history if "monitor/margin" in one]

    whole = entries()
    again = entries(str(tmp_path / "checkpoint-2"))
    assert [one["step"] for one in again] == [2, 4]
    for name in NAMES - {"monitor/seconds", "monitor/share"}:
        assert again[1][name] == whole[1][name]
    assert whole[1]["monitor/margin"] != whole[0]["monitor/margin"]
    other = PreferenceMonitorCallback(make_batch(4), unseen=unseen)
    with pytest.raises(ValueError, match=r"probe must be that of the training .* 6 rows, got 4"):
        train(tmp_path, other, **given).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = PreferenceMonitorCallback(probe)
    with pytest.raises(ValueError, match=r"unseen must be that of the training .* 3 rows, got 0"):
        train(tmp_path, other, **given).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.heavy
def test_two_in_one_training(tmp_path: Path) -> None:
    monitors = [PreferenceMonitorCallback(make_batch()) for _ in range(2)]
    with pytest.raises(ValueError, match="callbacks must hold one PreferenceMonitorCallback"):
        train(tmp_path, *monitors).train()


@pytest.mark.heavy
def test_in_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from fastpref.demo.data import Example
    from fastpref.demo.model import train_tokenizer

    rows = [
        {"prompt": f"one two {at}", "chosen": " three four five", "rejected": " six"}
        for at in range(8)
    ]
    examples = [Example.pair(*one.values()) for one in rows]
    tokenizer = train_tokenizer(examples, 400)
    model = make_model(vocab_size=len(tokenizer))
    args = trl.DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=2, logging_steps=1,
        per_device_train_batch_size=2, report_to="none", save_strategy="no", disable_tqdm=True,
        learning_rate=0.01,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=args,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    probe = next(iter(trainer.get_train_dataloader()))
    monitor = PreferenceMonitorCallback(probe, every=1, trainer=trainer)
    trainer.add_callback(monitor)
    trainer.train()
    entries = [one for one in trainer.state.log_history if "monitor/margin" in one]
    assert [one["step"] for one in entries] == [1, 2]
    # TRL's own rewards are those of other rows, but of the same sign after two steps on all alike.
    assert entries[-1]["monitor/margin"] > 0 and entries[-1]["monitor/accuracy"] == 1


@pytest.mark.slow
def test_cost_at_the_default_interval(tmp_path: Path) -> None:
    """Of a probe as large as a step's batch: under a hundredth of the training."""
    spent: list[float] = []

    class Timed(PreferenceMonitorCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            began = time.process_time()
            super().on_step_end(args, state, control, **given)
            spent.append(time.process_time() - began)

    monitor = Timed(make_batch(4))
    model = make_model(hidden_size=64, intermediate_size=128, vocab_size=VOCABULARY)
    trainer = train(tmp_path, monitor, model=model, max_steps=100, logging_steps=100)
    began = time.process_time()
    trainer.train()
    share = sum(spent) / (time.process_time() - began)
    print(f"{share:.2%} of the processor's time")
    assert any("monitor/share" in one for one in trainer.state.log_history)
    assert share < 0.01


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"every": 0}, ValueError, "every must be an int of at least 1"),
        ({"beta": 0.0}, ValueError, "beta must be a number greater than 0"),
        ({"probe": make_batch(5)}, ValueError, "as many rejected ones, got 5 rows"),
        ({"probe": {"ids": torch.zeros(2, 3)}}, ValueError, r"probe must hold input_ids \(B, T\)"),
        (
            {"unseen": {"input_ids": make_batch()["input_ids"]}},
            ValueError,
            "unseen must hold one of",
        ),
    ],
)
def test_bad_use(given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        PreferenceMonitorCallback(**{"probe": make_batch()} | given)
