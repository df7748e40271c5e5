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

    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    def sums(values: Tensor) -> Tensor:
        return torch.where(target < 0, 0, values).sum(1)

    def picked(logps: Tensor) -> Tensor:
        return sums(logps.gather(-1, target.clamp(min=0)[..., None])[..., 0])

    log_q = log_softmax(given["hidden"], given["weight"])
    log_p = log_softmax(given["ref_hidden"], given["ref_weight"]).detach()
    policy, function, extras = picked(log_q), objectives.get(objective), {}
    if objective == "tdpo":
        kl = sums((log_p.exp() * (log_p - log_q)).sum(-1))
        extras = dict(zip(("chosen_kl", "rejected_kl"), kl.chunk(2), strict=True))
    losses = function(*policy.chunk(2), *picked(log_p).chunk(2), **extras).losses
    return losses.mean(), policy


def found(loss: Tensor, logps: Tensor, given: dict[str, Tensor], upstream: float):
    leaves = [given["hidden"], given["weight"]]
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    names = ("d hidden", "d weight")
    results = dict(zip(names, gradients, strict=True))
    return {"loss": loss.detach()[None], "logps": logps.detach()} | results
