# SPDX-License-Identifier: Apache-2.0
"""The work that every implementation does: score a preference batch, apply DPO, go backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import objectives

IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """A preference batch as a trainer sees it."""

    sequences: int = 8  # B, chosen first
    length: int = 256  # T
    hidden_size: int = 1024  # H
    vocab_size: int = 32000  # V
    masked: float = 0.5  # share of each row that is prompt

    @property
    def positions(self) -> int:
        return self.sequences * self.length

    @property
    def prompt(self) -> int:
        """Tokens at the beginning of each row that are not scored."""
        return round(self.masked * self.length)

    @property
    def scored(self) -> int:
        """N."""
        return self.sequences * (self.length - self.prompt)

    @classmethod
    def of_model(cls, name: str, masked: float = 0.5) -> Shape:
        """With the head of a model."""
        hidden_size, vocab_size = MODELS[name]
        return cls(hidden_size=hidden_size, vocab_size=vocab_size, masked=masked)


# H and V.
MODELS = {
    "llama-3-8b": (4096, 128256),
    "llama-3.2-1b": (2048, 128256),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "gemma-2-2b": (2304, 256000),
    "gemma-3-270m": (640, 262144),
    "small": (1024, 32000),
    "tiny": (256, 8192),
}


@dataclass(frozen=True)
class Work:
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    target: Tensor  # (B, T)
    ref_hidden: Tensor  # (B, T, H), of a model that this one was trained from
    ref_weight: Tensor  # (V, H)

    @property
    def scored(self) -> Tensor:
        return self.target != IGNORE

    def to(self, dtype: torch.dtype) -> Work:
        models = self.hidden, self.weight, self.ref_hidden, self.ref_weight
        hidden, weight, *reference = (one.to(dtype) for one in models)
        return Work(hidden, weight, self.target, *reference)

    def on(self, device: str) -> Work:
        every = self.hidden, self.weight, self.target, self.ref_hidden, self.ref_weight
        return Work(*(one.to(device) for one in every))

    def leaves(self, trainable: bool) -> tuple[Tensor, Tensor]:
        """Fresh leaves: hidden, and the weight with or without gradient."""
        weight = self.weight.detach().requires_grad_(trainable)
        return self.hidden.detach().requires_grad_(), weight

    def dpo(self, logp: Tensor) -> Tensor:
        """The loss from per-token log-probabilities (B, T), 0 where not scored.

        The reference is uniform: Liger takes no precomputed log-probabilities.
        """
        chosen, rejected = logp.sum(-1).chunk(2)
        reference = torch.zeros_like(chosen)
        return objectives.dpo(chosen, rejected, reference, reference).losses.mean()


def make_work(
    shape: Shape,
    dtype: torch.dtype,
    overflowing: float = 0.0,
    seed: int = 0,
) -> Work:
    """Random rows whose targets are likely tokens, as in a trained model.

    Args:
        overflowing: share of scored rows whose target lies far more than 88 nats below the
            largest logit, where a plain exponential would overflow.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, vocab, width = shape.positions, shape.vocab_size, shape.hidden_size
    weight = torch.randn(vocab, width, generator=generator) * width**-0.5
    hidden = torch.randn(rows, width, generator=generator)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    # Towards the target's row: its logit rises by about 8.
    hidden += 8 * weight[target]
    if overflowing:
        hidden[:: round(1 / overflowing)] -= 200 * weight[target[:: round(1 / overflowing)]]
    target = target.view(shape.sequences, shape.length)
    target[:, : shape.prompt] = IGNORE
    hidden = hidden.view(shape.sequences, shape.length, width)
    ref_hidden = hidden + 0.1 * torch.randn(hidden.shape, generator=generator)
    ref_weight = weight + 0.1 * width**-0.5 * torch.randn(weight.shape, generator=generator)
    return Work(
        hidden.to(dtype), weight.to(dtype), target, ref_hidden.to(dtype), ref_weight.to(dtype)
    )
