# SPDX-License-Identifier: Apache-2.0
"""Two models of a few thousand weights, batches of pairs, and their logits in float64."""

from __future__ import annotations

import copy
import os
from typing import Any

# Read when the libraries are imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, HIDDEN, LAYERS = 37, 16, 3


def make_model(seed: int = 0, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**given | changes))


def moved_from(model: Any, by: float, seed: int = 5) -> Any:
    """A copy whose weights are not the same any more."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in other.parameters():
            one.add_(by * torch.randn(one.shape, generator=generator, dtype=one.dtype))
    return other


def make_batch(rows: int = 6, length: int = 11, seed: int = 3) -> dict[str, Tensor]:
    """Prompts of three tokens, responses of different lengths, padding behind."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    ends = torch.randint(5, length + 1, (rows, 1), generator=generator)
    places = torch.arange(length)[None]
    attended = (places < ends).long()
    ids = ids * attended
    labels = torch.where((places >= 3) & (attended == 1), ids, -100)
    return {"input_ids": ids, "attention_mask": attended, "labels": labels}


def plain_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, T - 1) of the tokens, from whole logits in float64."""
    own = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = own(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == -100, 0, picked)
