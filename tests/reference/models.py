# SPDX-License-Identifier: Apache-2.0
"""Tiny models that tests of references share."""

import os
from typing import Any

# Read when the libraries are imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Two layers whose weights are tied, a buffer of floats and one of integers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean = torch.randn(3)
        self.norm.num_batches_tracked += seed


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


def lora(seed: int = 0, adapters: tuple[str, ...] = ("default",), **options: Any) -> Any:
    """A small Llama with LoRA adapters whose factors are both random."""
    peft = __import__("pytest").importorskip("peft", reason="peft is not installed")
    from tests.integrations.transformers.trainings import make_model

    made = None
    for name in adapters:
        config = peft.LoraConfig(
            **{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
        )
        if made is None:
            made = peft.get_peft_model(make_model(), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, one in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(one, std=0.5)
    return made
