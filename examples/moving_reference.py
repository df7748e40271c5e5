# SPDX-License-Identifier: Apache-2.0
"""TR-DPO in transformers' Trainer: a reference that follows the policy, beside one that stays:

    python examples/moving_reference.py

Gorbatovski et al. 2024, arXiv:2404.09656: the reference is averaged with the policy every few steps
(soft) or replaced by it (hard). ``ReferenceCallback`` does so, and keeps the reference in every
checkpoint. DPO holds a policy near its reference: where that moves on, the policy goes farther from
where both began, in as many steps. In TRL: ``trainer.add_callback(ReferenceCallback(
trainer.ref_model, ...))``.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from fastpref import fuse_lm_head, objectives
from fastpref.reference import ReferenceCallback, frozen_copy

VOCABULARY, PROMPT, RESPONSE, PAIRS, STEPS, BETA = 40, 3, 6, 64, 32, 1.0


def make_pairs() -> list[dict[str, Tensor]]:
    """Chosen responses count on from the last token of their prompt, rejected ones repeat it."""
    prompts = torch.randint(1, VOCABULARY - RESPONSE, (PAIRS, PROMPT))
    steps = torch.arange(1, RESPONSE + 1)
    chosen = torch.cat([prompts, prompts[:, -1:] + steps], 1)
    rejected = torch.cat([prompts, prompts[:, -1:].expand(-1, RESPONSE)], 1)
    return [{"pair": pair} for pair in torch.stack([chosen, rejected], 1)]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([one["pair"] for one in rows], 1).flatten(0, 1)  # chosen rows first
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "labels": labels}


def logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch, fused_lm_head=True).log_probs
    return found.sum(1)


class LiveReference(Trainer):
    """DPO whose reference is scored in every step."""

    reference: Any

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            fixed = logps(self.reference, inputs).chunk(2)
        loss: Tensor = objectives.dpo(*logps(model, inputs).chunk(2), *fixed, beta=BETA).losses
        return loss.mean()


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return fuse_lm_head(LlamaForCausalLM(config))


def train(pairs: list[dict[str, Tensor]], **moves: Any) -> tuple[Any, Any]:
    """Policy and reference; ``moves`` are those of the callback."""
    policy, reference = make_model(), frozen_copy(make_model())
    with tempfile.TemporaryDirectory() as folder:
        trainer = LiveReference(
            model=policy,
            args=TrainingArguments(
                folder,
                use_cpu=True,
                max_steps=STEPS,
                per_device_train_batch_size=16,
                learning_rate=1e-3,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            data_collator=collate,
            train_dataset=pairs,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.reference = reference
        if moves:
            trainer.add_callback(ReferenceCallback(reference, **moves))
        trainer.train()
    return policy.eval(), reference


@torch.no_grad()
def margin(model: Any, pairs: list[dict[str, Tensor]]) -> float:
    """By how much more the log-probability of chosen responses has risen than that of rejected
    ones, since the beginning."""
    batch = collate(pairs)
    chosen, rejected = (logps(model, batch) - logps(make_model().eval(), batch)).chunk(2)
    return float((chosen - rejected).mean())


def main() -> None:
    torch.manual_seed(0)
    pairs = make_pairs()
    ways: dict[str, dict[str, Any]] = {
        "fixed": {},
        "soft": {"decay": 0.4, "every": 8},
        "hard": {"every": 16},
    }
    for name, moves in ways.items():
        policy, reference = train(pairs, **moves)
        print(
            f"{name:6} margin since the beginning: policy {margin(policy, pairs):.3f}, "
            f"reference {margin(reference, pairs):.3f}"
        )


if __name__ == "__main__":
    main()
