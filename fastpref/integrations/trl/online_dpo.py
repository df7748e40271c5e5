# SPDX-License-Identifier: Apache-2.0
"""DPO on completions of the policy, compared as they come (Guo et al., arXiv:2402.04792)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.experimental.online_dpo import OnlineDPOTrainer

from .fused import Fused

VISION = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")


class FastOnlineDPOTrainer(Fused, OnlineDPOTrainer):
    """TRL's OnlineDPOTrainer without logits: its arguments, losses, gradients and metrics."""

    def _forward(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        vision_inputs: dict[str, Any] | None = None,
    ) -> Tensor:
        """(B, T) log-probabilities of the completions' tokens, of padding too, which TRL logs."""
        length = completion_ids.shape[1]
        if vision_inputs is None:  # among which there may be no image cut off
            excess = max(prompt_ids.shape[1] + length - self.max_length, 0)
            prompt_ids, prompt_mask = prompt_ids[:, excess:], prompt_mask[:, excess:]
        images = vision_inputs or {}
        given = {name: images[name] for name in VISION if name in images}
        ids = torch.cat((prompt_ids, completion_ids), dim=1)
        # As TRL, which without a prompt scores each token by its own position.
        start = max(prompt_ids.shape[1] - 1, 0)
        labels = torch.full_like(ids, -100)
        labels[:, start : start + length] = completion_ids
        output = model(
            input_ids=ids,
            attention_mask=torch.cat((prompt_mask, completion_mask), dim=1),
            shift_labels=labels,
            fused_lm_head=True,
            **given,
        )
        log_probs: Tensor = output.log_probs
        return log_probs[:, start : start + length]
