# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy with label smoothing and a z-loss, on ``fastpref.linear_logprob``:

    python examples/smoothed_cross_entropy.py

``mean_logits`` and its gradient take no product; the gradient that arrives at ``lse`` projects the
tokens again, one product more than the likelihood alone. Label smoothing: Szegedy et al. 2016,
arXiv:1512.00567. The z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref import linear_logprob

IGNORE = -100


def smoothed_losses(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.1,
    z_loss: float = 0.0,
    **arguments: Any,
) -> Tensor:
    """Of each token, like ``target``: ``F.cross_entropy(logits, target,
    label_smoothing=label_smoothing, reduction="none")``, which mixes the target with a uniform
    distribution over the vocabulary, plus ``z_loss`` times the squared log of the normaliser.
    ``arguments`` are further ones of ``linear_logprob``."""
    outputs = ("logp", "mean_logits", "lse")
    scores = linear_logprob(hidden, weight, target, outputs=outputs, **arguments)
    uniform = scores.mean_logits - scores.lse  # the mean log-probability of all ids
    losses = -(1 - label_smoothing) * scores.logp - label_smoothing * uniform
    return losses + z_loss * scores.lse.square()


def main() -> None:
    torch.manual_seed(0)
    width, vocabulary = 64, 1000
    hidden = torch.randn(4, 32, width, device="cpu", dtype=torch.float32, requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cpu", dtype=torch.float32) / width**0.5
    target = torch.randint(vocabulary, (4, 32), device="cpu", dtype=torch.int64)
    target[:, :8] = IGNORE
    loss = smoothed_losses(hidden, weight, target).sum() / (target != IGNORE).sum()
    loss.backward()
    logits = (hidden.detach() @ weight.T).flatten(0, 1)
    plain = F.cross_entropy(logits, target.flatten(), label_smoothing=0.1)
    print(f"fastpref {loss.item():.6f}, torch {plain.item():.6f}")


if __name__ == "__main__":
    main()
