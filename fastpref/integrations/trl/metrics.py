# SPDX-License-Identifier: Apache-2.0
"""What TRL's trainers log of a batch, under TRL's names, from scores of a fused head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_tokens(trainer: Any, output: Any, mask: Tensor, attended: Tensor) -> None:
    """``entropy`` of scored tokens, ``num_tokens`` so far.

    Args:
        output: of the fused head, by token (B, T - 1).
        mask: (B, T - 1) bool, the scored ones.
        attended: (B, T), other than 0 where there is no padding.
    """
    mode = "train" if trainer.model.training else "eval"
    metrics, gathered = trainer._metrics[mode], trainer.accelerator.gather_for_metrics
    entropy, count = gathered((output.entropy.detach() * mask).sum()), gathered(mask.sum())
    metrics["entropy"].append((entropy.sum() / count.sum().clamp(min=1)).item())
    if mode == "train":
        trainer._total_train_tokens += gathered(attended.sum()).sum().item() // trainer._tp_size
    metrics["num_tokens"] = [trainer._total_train_tokens]


@torch.no_grad()
def log_pairs(
    trainer: Any, output: Any, mask: Tensor, rewards: Tensor, logps: Tensor, branches: int = 2
) -> None:
    """Means over pairs of rewards, log-probabilities, logits and accuracies.

    Args:
        output, mask: as of ``log_tokens``; chosen rows first, then rejected ones.
        rewards, logps: (2, P), chosen first.
        branches: of how many parts, as long as each other, the rows are.
    """
    mode = "train" if trainer.model.training else "eval"
    metrics, gathered = trainer._metrics[mode], trainer.accelerator.gather_for_metrics
    means, masks = output.mean_logits.chunk(branches), mask.chunk(branches)
    counts = [gathered(kept.sum()).sum().clamp(min=1) for kept in masks[:2]]
    for name, values, kept, count in zip(
        ("chosen", "rejected"), means, masks, counts, strict=False
    ):
        metrics[f"logits/{name}"].append((gathered(values[kept].sum()).sum() / count).item())
    correct = gathered((output.is_top1.chunk(branches)[0] & masks[0]).sum()).sum()
    metrics["mean_token_accuracy"].append((correct / counts[0]).item())
    chosen, rejected = rewards
    numbers = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    for name, values in numbers.items():
        metrics[name].append(trainer.accelerator.gather(values.contiguous()).mean().item())
