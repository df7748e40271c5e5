# SPDX-License-Identifier: Apache-2.0
"""KTO in transformers' own Trainer: single responses, each good or bad, no pairs.

    python examples/kto_trainer.py

A small model with random weights learns to count on: responses that go on counting are desirable,
those that repeat themselves are not. Any causal LM and any data set of token ids take its place.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastpref
from fastpref.integrations.transformers import PreferenceCollator, add_reference_logps, loss_func

VOCABULARY = 64
PAD = 0


def make_rows(count: int) -> list[dict[str, Any]]:
    """A prompt counts three numbers; what follows goes on, or repeats the last."""
    rows = []
    for i in range(count):
        start, good = 1 + i % (VOCABULARY - 8), i % 3 > 0
        last = start + 2
        response = list(range(last + 1, last + 5)) if good else [last] * 4
        prompt = list(range(start, last + 1))
        rows.append({"prompt_ids": prompt, "completion_ids": response, "label": good})
    return rows


def margin(predictions: Any) -> dict[str, float]:
    """How far the rewards of desirable responses lie above the others'."""
    rewards = predictions.predictions[:, 0]
    good = predictions.label_ids.numbers("labels") != 0
    return {"margin": float(rewards[good].mean() - rewards[~good].mean())}


def train(folder: str) -> dict[str, float]:
    """What ``Trainer.evaluate`` says afterwards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=PAD,
    )
    model = fastpref.fuse_lm_head(LlamaForCausalLM(config))
    loss = loss_func("kto", beta=0.1, undesirable_weight=2.0)  # half as many are undesirable
    collator = PreferenceCollator(loss.objective, pad_token_id=PAD)
    # The policy before its first step is the reference.
    data = add_reference_logps(Dataset.from_list(make_rows(192)), model, collator, batch_size=32)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            learning_rate=3e-3,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
        ),
        data_collator=collator,
        train_dataset=data.select(range(160)),
        eval_dataset=data.select(range(160, 192)),
        compute_loss_func=loss,
        preprocess_logits_for_metrics=loss.rewards,
        compute_metrics=margin,
    )
    trainer.train()
    metrics: dict[str, float] = trainer.evaluate()
    return metrics


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(folder)
    print(f"loss {metrics['eval_loss']:.3f}   reward margin {metrics['eval_margin']:.3f}")


if __name__ == "__main__":
    main()
