# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers by method, stock and on fastpref. This module needs trl and datasets."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from ...demo.data import Example
from ...demo.model import train_tokenizer
from ...demo.settings import configured, device, silenced
from ...integrations import trl as integration
from .runs import Training


class Method(NamedTuple):
    module: str  # of TRL's trainer and its config
    name: str  # of both, without "Trainer" and "Config"
    subclass: str | None  # of fastpref, where a patch does not reach
    arguments: dict[str, Any] = {}  # noqa: RUF012  # of the config


METHODS = {
    "dpo": Method("trl", "DPO", None),
    "orpo": Method("trl.experimental.orpo", "ORPO", "FastORPOTrainer"),
    "simpo": Method("trl.experimental.cpo", "CPO", "FastCPOTrainer", {"loss_type": "simpo"}),
    "tpo": Method("trl.experimental.tpo", "TPO", "FastTPOTrainer"),
}
LORA = {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def make_trainer(
    training: Training, examples: Sequence[Example], on_fastpref: bool, directory: Path
) -> Any:
    """A trainer of ``training``; ``train()`` does its steps and saves nothing."""
    if on_fastpref:
        integration.patch()
    method = METHODS[training.method]
    library = importlib.import_module(method.module)
    made = getattr(library, f"{method.name}Trainer")
    if on_fastpref and method.subclass is not None:
        made = getattr(integration, method.subclass)
    tokenizer = train_tokenizer(examples, training.vocabulary)
    examples = _fitting(examples, tokenizer, training.max_length)
    given: dict[str, Any] = {"model": _model(training, tokenizer)}
    if training.adapters:
        given["peft_config"] = importlib.import_module("peft").LoraConfig(
            task_type="CAUSAL_LM", **LORA
        )
    elif method.name == "DPO":
        given["ref_model"] = _model(training, tokenizer)
    trainer = made(
        **given,
        args=configured(
            getattr(library, f"{method.name}Config"),
            directory,
            per_device_train_batch_size=training.batch,
            max_steps=training.steps,
            max_length=training.max_length,
            learning_rate=1e-4 if training.adapters else 1e-5,
            lr_scheduler_type="constant",
            **method.arguments,
        ),
        train_dataset=Dataset.from_list([_row(one, training.method) for one in examples]),
        processing_class=tokenizer,
    )
    return silenced(trainer)


def _fitting(examples: Sequence[Example], tokenizer: Any, most: int) -> list[Example]:
    """Those of which nothing is cut off: TRL takes the mean of a response without tokens too."""
    found = []
    for one in examples:
        texts = [one.prompt + text for text in (one.chosen, one.rejected)]
        # And the token that ends it.
        if max(map(len, tokenizer(texts)["input_ids"])) + 1 < most:
            found.append(one)
    if not found:
        raise ValueError(f"no pair has fewer than {most} tokens; name shorter ones with --pairs")
    return found


def _model(training: Training, tokenizer: Any) -> Any:
    """The same one at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=training.vocabulary,
        hidden_size=training.hidden,
        intermediate_size=training.hidden * 8 // 3,
        num_hidden_layers=training.layers,
        num_attention_heads=max(1, training.hidden // 64),
        max_position_embeddings=training.max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with device():
        return LlamaForCausalLM(config)


def _row(example: Example, method: str) -> dict[str, str]:
    row = {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}
    # The gold response of a triple: the data has pairs.
    return row | ({"reference": example.chosen} if method == "tpo" else {})
