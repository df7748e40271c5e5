# SPDX-License-Identifier: Apache-2.0
"""Policies small enough to spread over processes in tests, a batch whose pairs differ in length,
and the gradients of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpref import ScoringOptions, preference_loss

IGNORE = -100
PAIRS, LENGTH, WIDTH, VOCABULARY = 4, 9, 16, 57
Batch = dict[str, Tensor]


class LossHead(nn.Linear):
    """Owns the weight, and has the loss for its forward."""

    def forward(self, hidden: Tensor, batch: Batch, **given: Any) -> Tensor:  # type: ignore[override]
        return loss_of(hidden, self.weight, self.bias, batch, **given)


class Policy(nn.Module):
    """Embeddings, a layer, a norm and a head. ``functional``: the loss is a call in its own
    forward, with the weight of the head; otherwise the head's forward."""

    def __init__(self, *, tied: bool = False, functional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = LossHead(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.functional = functional

    def forward(self, batch: Batch, **given: Any) -> Tensor:
        embedded = self.embed(batch["ids"])
        hidden = self.norm(embedded + torch.tanh(self.layer(embedded)))
        if self.functional:
            return loss_of(hidden, self.head.weight, self.head.bias, batch, **given)
        loss: Tensor = self.head(hidden, batch, **given)
        return loss


def loss_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: Batch,
    *,
    denominator: float,
    options: ScoringOptions | None = None,
) -> Tensor:
    return preference_loss(
        hidden[:, :-1],
        weight,
        batch["labels"][:, 1:],
        "dpo",
        layout="interleaved",
        bias=bias,
        ref_logps=batch["ref_logps"],
        denominator=denominator,
        options=options,
    ).loss


def make_policy(**settings: bool) -> Policy:
    torch.manual_seed(3)
    policy = Policy(**settings)
    nn.init.normal_(policy.head.weight, std=0.5)
    return policy


def whole_batch(pairs: int = PAIRS) -> Batch:
    """Pairs side by side, of different lengths. The last pair has no scored token."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(VOCABULARY, (2 * pairs, LENGTH), generator=generator)
    labels = ids.clone()
    for row in range(2 * pairs):
        labels[row, : 2 + row % 3] = IGNORE
        labels[row, LENGTH - row % 4 :] = IGNORE
    labels[-2:] = IGNORE
    ref_logps = -4.0 * (labels[:, 1:] != IGNORE).sum(1)
    return {"ids": ids, "labels": labels, "ref_logps": ref_logps}


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Of pairs from ``start`` to ``stop``."""
    return {name: value[2 * start : 2 * stop] for name, value in batch.items()}


def expected_gradients(pairs: int = PAIRS, **settings: bool) -> dict[str, Tensor]:
    """Of one process in float64: the mean over all pairs."""
    policy = make_policy(**settings).double()
    policy(whole_batch(pairs), denominator=pairs).backward()
    return {name: value.grad for name, value in policy.named_parameters() if value.grad is not None}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], error: float = 1e-6) -> None:
    """Each to ``error`` of its largest entry."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        largest = float(want.abs().max())
        assert largest > 1e-5, f"{name}: nothing was compared"
        off = float((found[name].double() - want.double()).abs().max())
        assert off <= error * largest, f"{name}: {off / largest:.1e} of {largest:.2g} away"
