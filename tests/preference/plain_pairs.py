# SPDX-License-Identifier: Apache-2.0
"""A batch of pairs at any dtype, and its loss, log-probs and gradients in plain torch."""

import torch
from torch import Tensor

from fastpref import objectives

B, T, H, V = 12, 24, 48, 700
NAMES = ("hidden", "weight", "ref_hidden", "ref_weight")


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """Likely tokens, as of a trained model, in the dtype's own values."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(V, H, generator=generator) * H**-0.5
    target = torch.randint(V, (B, T), generator=generator)
    hidden = torch.randn(B, T, H, generator=generator) + 4 * weight[target]
    noise = torch.randn(B, T, H, generator=generator)
    models = hidden, weight, hidden + 0.2 * noise, weight
    target[torch.rand(B, T, generator=generator) < 0.4] = -100
    return dict(zip(NAMES, (one.to(dtype) for one in models), strict=True)) | {"target": target}


def plain(given: dict[str, Tensor], objective: str) -> tuple[Tensor, Tensor]:
    target = given["target"]

    def sums(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        logits = hidden @ weight.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return torch.where(target < 0, 0, picked).sum(1)

    policy = sums(given["hidden"], given["weight"])
    reference = sums(given["ref_hidden"], given["ref_weight"]).detach()
    function = objectives.get(objective)
    return function(*policy.chunk(2), *reference.chunk(2)).losses.mean(), policy


def found(loss: Tensor, logps: Tensor, given: dict[str, Tensor], upstream: float):
    leaves = [given["hidden"], given["weight"]]
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    names = ("d hidden", "d weight")
    results = dict(zip(names, gradients, strict=True))
    return {"loss": loss.detach()[None], "logps": logps.detach()} | results
