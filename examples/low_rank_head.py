# SPDX-License-Identifier: Apache-2.0
"""A head whose weight's gradient is never formed, trained with DPO beside a dense one:

    python examples/low_rank_head.py

``DCTAdamW`` hands its basis to ``preference_loss``, which adds up the gradient's projection on a
few columns of the discrete cosine transform at rank / hidden size of that gradient's product. After
"SVD-free low-rank adaptive gradient optimization", arXiv:2505.17967.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref import explain, preference_loss
from fastpref.optim import DCTAdamW

PAIRS, LENGTH, HIDDEN, VOCABULARY, RANK, STEPS = 8, 16, 64, 500, 16, 40


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Hidden states of chosen and rejected responses, which differ along one direction, and their
    tokens."""
    generator = torch.Generator().manual_seed(step)
    like: dict[str, Any] = {"generator": generator, "device": "cpu"}
    hidden = torch.randn(2 * PAIRS, LENGTH, HIDDEN, dtype=torch.float32, **like)
    hidden[:PAIRS] += torch.linspace(-1, 1, HIDDEN, dtype=torch.float32, device="cpu")
    target = torch.randint(VOCABULARY // 2, (2 * PAIRS, LENGTH), dtype=torch.int64, **like)
    target[PAIRS:] += VOCABULARY // 2
    return hidden, target


def trained(rank: int | None) -> list[float]:
    """The loss of each step."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(
        VOCABULARY, HIDDEN, generator=generator, dtype=torch.float32, device="cpu"
    )
    optimizer: torch.optim.Optimizer
    if rank is None:
        optimizer = torch.optim.AdamW([weight.requires_grad_()], lr=2e-2, weight_decay=0.0)
    else:
        optimizer = DCTAdamW(weight, rank=rank, lr=2e-2, update_every=10)
    losses = []
    ref_logps = torch.zeros(2 * PAIRS, dtype=torch.float32, device="cpu")
    for step in range(STEPS):
        hidden, target = batch(step)
        given: dict[str, Any] = {"ref_logps": ref_logps}
        if isinstance(optimizer, DCTAdamW):
            given["weight_grad_basis"] = optimizer.basis
        if step == 1:
            plan = explain(hidden, weight, target, "dpo", **given)
            print(f"rank {rank or HIDDEN}: {plan.units:.2f} products a step")
        output = preference_loss(hidden, weight, target, "dpo", **given)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses


def main() -> None:
    for rank in (None, RANK):
        losses = trained(rank)
        print(f"rank {rank or HIDDEN}: loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
