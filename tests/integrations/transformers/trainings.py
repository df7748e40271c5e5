# SPDX-License-Identifier: Apache-2.0
"""A model, data and trainings of a fraction of a second, and the same in plain torch: whole logits
of one response at a time in float64, no padding, no batches."""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

# Read when the libraries are imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastpref import fuse_lm_head
from fastpref.integrations.transformers import PreferenceCollator, PreferenceLoss

PAD = 0
VOCABULARY = 31
Row = dict[str, Any]


def make_model(seed: int = 0) -> Any:
    """A causal language model of random weights with a fused head, float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    return fuse_lm_head(LlamaForCausalLM(config))


def make_rows(unit: str, count: int = 7, responses: int = 3) -> list[Row]:
    """Rows of different lengths; a list has between two and ``responses`` of them."""
    generator = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def ids(low: int, high: int) -> list[int]:
        return [number(1, VOCABULARY) for _ in range(number(low, high))]

    def logp(tokens: list[int]) -> float:
        return -4.5 * len(tokens) + float(torch.randn((), generator=generator))

    rows = []
    for i in range(count):
        row: Row = {"prompt_ids": ids(2, 6)}
        if unit == "pair":
            row |= {"chosen_ids": ids(2, 7), "rejected_ids": ids(1, 9)}
            row |= {f"ref_{one}_logps": logp(row[f"{one}_ids"]) for one in ("chosen", "rejected")}
            row["reward_margin"] = 0.5 + number(0, 5)
        elif unit == "unit":
            row |= {"completion_ids": ids(2, 7), "label": i % 3 != 1}
            row["ref_logps"] = logp(row["completion_ids"])
        else:
            size = number(2, responses + 1)
            row["completions_ids"] = [ids(2, 7) for _ in range(size)]
            row["ref_logps"] = [logp(one) for one in row["completions_ids"]]
            row["scores"] = [float(number(0, 100)) for _ in range(size)]
        rows.append(row)
    return rows


class Gradients(TrainerCallback):
    """All gradients as one vector, at each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.steps.append(flat_gradients(given["model"]))


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def make_trainer(
    loss: PreferenceLoss,
    rows: Sequence[Row],
    folder: Any,
    *,
    model: Any = None,
    callbacks: Sequence[Any] = (),
    collator: Any = None,
    trainer: Callable[..., Any] = InOrder,
    given: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Rows in their order, two at a time, for one epoch of plain descent that does not move: each
    step's gradient is that at the first weights."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    made = trainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(**{**defaults, **arguments}),
        data_collator=collator or PreferenceCollator(loss.objective, pad_token_id=PAD),
        train_dataset=list(rows),
        compute_loss_func=loss,
        callbacks=[loss.callback, *callbacks],
        **(given or {}),
    )
    made.remove_callback(PrinterCallback)
    return made


def train(loss: PreferenceLoss, rows: Sequence[Row], folder: Any, **arguments: Any) -> Any:
    """The gradients of all optimizer steps, and the numbers that the Trainer logged as loss."""
    gradients = Gradients()
    trainer = make_trainer(loss, rows, folder, callbacks=[gradients], **arguments)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return gradients.steps, logged


def flat_gradients(model: Any) -> Tensor:
    return torch.cat([one.grad.detach().flatten().double() for one in model.parameters()])


def plain_logps(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """The log-probability of each token of a completion."""
    tokens = torch.tensor([[*prompt, *completion]])
    logits = type(model).forward(model, input_ids=tokens).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]


def plain_step(loss_of: Callable[[Any], Tensor], model: Any = None) -> tuple[Tensor, Tensor]:
    """Loss and flat gradient of ``loss_of(scores)``, where ``scores(prompt, completion)`` are the
    log-probabilities of a completion's tokens, all in float64."""
    exact = copy.deepcopy(make_model() if model is None else model).double()
    loss = loss_of(lambda prompt, completion: plain_logps(exact, prompt, completion))
    loss.backward()
    return loss.detach(), flat_gradients(exact)


def check_step(gradient: Tensor, logged: float, loss_of: Callable[[Any], Tensor]) -> None:
    """As in plain torch, to float32's rounding."""
    loss, expected = plain_step(loss_of)
    assert abs(logged - float(loss)) <= 1e-4 * (1 + abs(float(loss)))
    assert float(expected.norm()) > 1e-3
    assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm())
