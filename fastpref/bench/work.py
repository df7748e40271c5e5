# SPDX-License-Identifier: Apache-2.0
"""What goes in: the hidden states, head and targets of a preference batch, and of its reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

IGNORE = -100
# Nats. A language model's loss on its own kind of text: its entropy, where it is calibrated.
TRAINED_ENTROPY = 2.0
ROWS_OF_A_BLOCK = 256
CALIBRATION_ROWS = 32

Logits = Literal["trained", "random"]

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
# Of models whose tokens are images: VAR's, LlamaGen's, Chameleon's, Emu3's.
IMAGE_VOCABULARIES = {"var": 4096, "llamagen": 16384, "chameleon": 65536, "emu3": 184622}


@dataclass(frozen=True)
class Shape:
    """A preference batch as a collator pads it: prompt, completion, padding."""

    sequences: int = 8  # B, even: the chosen responses, then the rejected ones
    length: int = 256  # T
    hidden_size: int = 1024  # H
    vocab_size: int = 32000  # V
    masked: float = 0.5  # share of the positions that are prompt or padding

    @property
    def positions(self) -> int:
        return self.sequences * self.length

    @property
    def completion(self) -> int:
        """Mean length of a completion."""
        return self.length - round(self.masked * self.length)

    @property
    def scored(self) -> int:
        """N."""
        return self.sequences * self.completion

    def spans(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """Where each row's completion begins and ends. A pair shares its prompt; one response is
        as much longer than the mean as the other is shorter."""
        unscored, pairs = self.length - self.completion, self.sequences // 2
        spans = []
        for share, spread in torch.rand(
            pairs, 2, generator=generator, dtype=torch.float32, device="cpu"
        ).tolist():
            prompt = round(unscored * (1 + 2 * share) / 4)  # a quarter to three quarters of it
            half = round((2 * spread - 1) * min(unscored - prompt, self.completion - 1))
            spans.append([(prompt, prompt + self.completion + one) for one in (half, -half)])
        return [pair[0] for pair in spans] + [pair[1] for pair in spans]


@dataclass(frozen=True)
class Work:
    shape: Shape
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    target: Tensor  # (B, T)
    ref_hidden: Tensor  # (B, T, H), of a model that this one was trained from
    ref_weight: Tensor  # (V, H)
    entropy: float  # mean entropy of a token, in nats

    @functools.cached_property
    def scored(self) -> Tensor:
        return self.target != IGNORE

    @functools.cached_property
    def positions(self) -> Tensor:
        """(N,) of the scored tokens in the flattened batch: indexing by them asks a GPU nothing."""
        return self.scored.flatten().nonzero()[:, 0]

    def rows(self, hidden: Tensor) -> Tensor:
        """(B, T, H) to the scored (N, H)."""
        return hidden.flatten(0, 1)[self.positions]

    def leaves(self, hidden: bool, weight: bool) -> tuple[Tensor, Tensor]:
        """Hidden states and weight as fresh leaves that need a gradient or not."""
        leaf, head = self.hidden.detach(), self.weight.detach()
        return leaf.requires_grad_(hidden), head.requires_grad_(weight)


def make_work(
    shape: Shape,
    dtype: torch.dtype,
    device: str = "cpu",
    logits: Logits = "trained",
    overflowing: float = 0.0,
    seed: int = 0,
) -> Work:
    """Random rows whose targets are drawn from their own softmax.

    Args:
        logits: "trained" scales the hidden states until the mean entropy is ``TRAINED_ENTROPY``;
            "random" leaves logits of variance 1, an entropy of nearly log V.
        overflowing: share of scored rows, at least one, whose target lies far more than 88 nats
            below the largest logit, where a plain exponential would overflow.
    """
    # The structure is drawn on the CPU: spans are wanted there.
    structure = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    rows, vocab, width = shape.positions, shape.vocab_size, shape.hidden_size

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32)

    weight = draw(vocab, width) * width**-0.5
    hidden = draw(rows, width)
    sample = hidden[:CALIBRATION_ROWS] @ weight.t()
    if logits == "trained":
        scale = _scale_to_entropy(sample, TRAINED_ENTROPY)
        hidden, sample = hidden * scale, sample * scale
    chance = torch.rand(rows, 1, generator=generator, device=device, dtype=torch.float32)
    blocks = zip(hidden.split(ROWS_OF_A_BLOCK), chance.split(ROWS_OF_A_BLOCK), strict=True)
    target = torch.cat([_drawn(block @ weight.t(), share) for block, share in blocks])
    target = target.view(shape.sequences, shape.length)
    for row, (begin, end) in zip(target, shape.spans(structure), strict=True):
        row[:begin] = row[end:] = IGNORE
    if overflowing:
        scored = (target.flatten() != IGNORE).nonzero()[:, 0]
        every = scored[:: round(1 / overflowing)]
        hidden[every] -= 200 * weight[target.flatten()[every]]
    ref_hidden = hidden + 0.1 * hidden.std() * draw(rows, width)
    ref_weight = weight + 0.1 * width**-0.5 * draw(vocab, width)
    batch = shape.sequences, shape.length, width
    return Work(
        shape,
        hidden.view(batch).to(dtype),
        weight.to(dtype),
        target,
        ref_hidden.view(batch).to(dtype),
        ref_weight.to(dtype),
        float(_entropy(sample)),
    )


def _drawn(logits: Tensor, chance: Tensor) -> Tensor:
    """A token a row from its softmax, by inverting its distribution function."""
    cumulative = logits.softmax(-1).cumsum(-1)
    found = torch.searchsorted(cumulative, chance * cumulative[:, -1:])[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def _entropy(logits: Tensor) -> Tensor:
    """Mean over the rows."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean()


def _scale_to_entropy(logits: Tensor, wanted: float) -> float:
    """By which to multiply ``logits``: entropy falls as the scale grows."""
    low, high = 0.0, 64.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(logits * middle) > wanted else (low, middle)
    return high
