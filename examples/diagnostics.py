# SPDX-License-Identifier: Apache-2.0
"""What a preference training does to a model, while it runs and afterwards:

    python examples/diagnostics.py

A tiny model is trained with DPO in transformers' Trainer; ``PreferenceMonitorCallback`` scores
pairs that are not trained on every few steps, and the credit of each token of one response is drawn
at the end, as ``credit.html`` and ``credit.png``. For two models on disk ``python -m fastpref
diagnose`` writes a whole report.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastpref
from fastpref.diagnostics import PreferenceMonitorCallback, credit_map, spinal
from fastpref.integrations.transformers import (
    PreferenceCollator,
    add_reference_logps,
    loss_func,
)
from fastpref.sequences import token_credit

WORDS = ["<pad>", *(f"w{n}" for n in range(1, 40))]


def rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Chosen responses count on from the last word of their prompt, rejected ones repeat it."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(1, 30, (count, 3), generator=generator, dtype=torch.int64, device="cpu")
    return [
        {
            "prompt_ids": start,
            "chosen_ids": [start[-1] + step for step in range(1, 6)],
            "rejected_ids": [start[-1]] * 7,
        }
        for start in starts.tolist()
    ]


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return fastpref.fuse_lm_head(LlamaForCausalLM(config))


def main(folder: Path) -> None:
    from datasets import Dataset

    model = make_model()
    start = copy.deepcopy(model)
    loss = loss_func("dpo", beta=0.5)
    collator = PreferenceCollator(loss.objective, pad_token_id=0)
    # What the monitor takes needs no reference: it is the model as the training finds it.
    probe, _ = collator.inputs(rows(8, seed=1))
    monitor = PreferenceMonitorCallback(probe, every=10, beta=0.5)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            use_cpu=True,
            max_steps=40,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        data_collator=collator,
        train_dataset=add_reference_logps(Dataset.from_list(rows(64, seed=0)), model, collator),
        compute_loss_func=loss,
        callbacks=[loss.callback, monitor],
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "monitor/margin" in entry:
            names = ("margin", "accuracy", "chosen_drop", "rejected_drop")
            shown = ", ".join(f"{name} {entry[f'monitor/{name}']:.3f}" for name in names)
            print(f"step {entry['step']}: {shown}")
    with torch.no_grad():
        logps, ref_logps = (one.eval()(**probe).log_probs for one in (model, start))
    ids, labels = probe["input_ids"][0], probe["fused_labels"][0, 1:]
    scored = labels != -100
    credit = token_credit(logps[:1, scored], ref_logps[:1, scored], beta=0.5)[0]
    tokens = [f"{WORDS[one]} " for one in ids[1:][scored].tolist()]
    page, picture = credit_map(tokens, credit, folder / "credit", title="a chosen response")
    trace = spinal(model, probe)
    angles = ", ".join(f"{one:.3f}" for one in trace.transport)
    print(f"transport by layer {angles}; credit in {page.name} and {picture.name}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
