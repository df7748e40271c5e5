# SPDX-License-Identifier: Apache-2.0
"""Trainings of a fraction of a second whose loss has a live reference."""

from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fastpref import objectives
from tests.integrations.transformers.trainings import VOCABULARY, make_model

LENGTH, PROMPT = 8, 3


def make_rows(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(1, VOCABULARY, (count, 2, LENGTH), generator=generator)
    rows[:, 1, :PROMPT] = rows[:, 0, :PROMPT]
    return [{"pair": row} for row in rows]


def logps(model: Any, rows: Tensor) -> Tensor:
    """(B,) of the responses."""
    scores = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    return scores.gather(-1, rows[:, 1:, None])[:, PROMPT - 1 :, 0].sum(1)


class Live(Trainer):
    """DPO against ``reference(policy)``, a context in which the reference is called."""

    reference: Any

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        rows = inputs["pair"].transpose(0, 1).flatten(0, 1)
        policy = logps(model, rows).chunk(2)
        with torch.no_grad(), self.reference(model) as reference:
            fixed = logps(reference, rows).chunk(2)
        loss: Tensor = objectives.dpo(*policy, *fixed, beta=0.5).losses.mean()
        return loss


class Weights(TrainerCallback):
    """Of the policy, before and after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.keep(given["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.keep(given["model"])

    def keep(self, model: Any) -> None:
        self.steps.append({n: one.detach().clone() for n, one in model.named_parameters()})


def make_trainer(
    folder: Any,
    *,
    model: Any = None,
    trainer: Any = Live,
    callbacks: Any = (),
    given: Any = None,
    **arguments: Any,
) -> Any:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 3,
    }
    made = trainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(**{**defaults, **arguments}),
        data_collator=lambda rows: {"pair": torch.stack([row["pair"] for row in rows])},
        train_dataset=make_rows(),
        callbacks=list(callbacks),
        **(given or {}),
    )
    made.remove_callback(PrinterCallback)
    return made
