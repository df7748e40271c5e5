# SPDX-License-Identifier: Apache-2.0
"""The monitor in transformers' Trainer and in TRL's: its numbers against whole logits, where they
are logged, and what it costs."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.diagnostics import PreferenceMonitorCallback
from tests.diagnostics.plain import centred_similarity, spearman
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
def test_numbers_in_transformers_trainer(
    tmp_path: Path, through_trainer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(perf_counter=iter([0.0, 8.0, 10.0, 16.0, 20.0]).__next__)
    monkeypatch.setattr("fastpref.diagnostics.monitor.time", clock)
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
    found = {name: entries[-1][name] for name in NAMES}
    chosen, rejected = (one.numpy() for one in (after - before).chunk(2))
    margins = 0.5 * (chosen - rejected)
    lengths = (probe["labels"][:, 1:] != -100).sum(1).numpy()
    more = (lengths[: len(margins)] - lengths[len(margins) :]).astype(float)
    order = [(one[:3] - one[3:]).tolist() for one in (before, after)]
    wanted = {
        "chosen_drop": -chosen.mean(),
        "rejected_drop": -rejected.mean(),
        "dispersion": float((others[1] - others[0]).mean()),
        "chosen_fell": (chosen < 0).mean(),
        "both_fell": ((chosen < 0) & (rejected < 0)).mean(),
        "margin": margins.mean(),
        "accuracy": (margins > 0).mean(),
        "length_correlation": np.corrcoef(more, margins)[0, 1],
        "length_slope": np.polyfit(more, margins, 1)[0],
        "margin_order": spearman(*order),
        "ches": np.mean(centred_similarity(model, probe)),
    }
    for name, value in wanted.items():
        assert found.pop(f"monitor/{name}") == pytest.approx(float(value), rel=1e-3, abs=1e-3), name
    # Of ten seconds since the last measurement.
    assert found == {"monitor/seconds": 4.0, "monitor/share": 0.4}
    assert model.training and "forward" not in vars(model)


@pytest.mark.heavy
def test_a_training_that_diverges_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says so, and nothing is logged; a model that begins so is refused."""
    model = make_model()
    monitor = PreferenceMonitorCallback(make_batch(), every=1)

    class Diverging(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] = torch.nan

    trainer = train(tmp_path, monitor, Diverging(), model=model, logging_nan_inf_filter=False)
    trainer.train()
    assert trainer.state.global_step == 4
    steps = [one["step"] for one in trainer.state.log_history if "monitor/margin" in one]
    assert steps == [2] and "step 3: log-probabilities" in caplog.text
    with pytest.raises(ValueError, match="probe and unseen must have finite log-probabilities"):
        train(tmp_path, PreferenceMonitorCallback(make_batch()), model=model).train()


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
