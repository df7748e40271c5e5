# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ``fastpref.fuse_lm_head``: the same keywords and output, from full logits in plain
torch."""

import types
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

IGNORE = -100


@dataclass
class FusedOutput(ModelOutput):
    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def fuse_lm_head(model: Any) -> Any:
    """``model``, whose forward takes ``fused_lm_head`` and ``fused_labels``."""
    if "forward" not in vars(model):
        model.forward = types.MethodType(forward, model)
    return model


def forward(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    labels: Any = None,
    fused_labels: Any = None,
    fused_lm_head: bool = False,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> Any:
    given = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
    if not fused_lm_head:
        return type(self).forward(self, labels=labels, **given)
    plain = type(self).forward(self, **given)
    target = (fused_labels if labels is None else labels)[:, 1:]
    mask = target != IGNORE
    logp = plain.logits[:, :-1].log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    log_probs = logp.masked_fill(~mask, 0)
    items = mask.sum() if num_items_in_batch is None else num_items_in_batch
    return FusedOutput(
        loss=-log_probs.sum() / items,
        log_probs=log_probs,
        label_mask=mask,
        aux_loss=plain.get("aux_loss"),
    )
