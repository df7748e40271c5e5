# SPDX-License-Identifier: Apache-2.0
"""Responses under a model of transformers: log-probabilities and hidden states of one forward pass
through its fused head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.causal_lm import fuse_lm_head, unfuse_lm_head
from ..integrations.causal_lm.fuse import STATE

IGNORE = -100
NAMES = ("fused_labels", "completion_mask", "labels")  # in this order, which a batch may hold


class Responses(NamedTuple):
    logps: Tensor  # (B, T - 1) of each token, 0 where it is not scored
    mask: Tensor  # (B, T - 1) bool, which are
    hidden: Tensor | None  # (B, T - 1, H), the states that predict them

    @property
    def sums(self) -> Tensor:
        """(B,) float64."""
        return self.logps.sum(1, dtype=torch.float64)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64."""
        return self.mask.sum(1)


def scored_labels(
    batch: Mapping[str, Any], required: bool = True, name: str = "batch"
) -> Tensor | None:
    """(B, T), -100 where nothing is scored: of a collator of fastpref, of TRL, or labels."""
    ids = batch["input_ids"]
    for one in NAMES:
        found = batch.get(one)
        if isinstance(found, Tensor) and found.shape == ids.shape:
            return ids.masked_fill(found == 0, IGNORE) if one == "completion_mask" else found
    if not required:
        return None
    raise ValueError(
        f"{name} must hold one of {', '.join(NAMES)} beside input_ids {tuple(ids.shape)}, of that "
        f"shape, got {', '.join(batch)}"
    )


def moved(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """On the device of ``model``."""
    device = next(model.parameters()).device
    return {n: one.to(device) if isinstance(one, Tensor) else one for n, one in batch.items()}


def base_model(model: nn.Module) -> nn.Module:
    """What PEFT has wrapped, with its adapters."""
    get_base_model = getattr(model, "get_base_model", None)
    found: nn.Module = get_base_model() if callable(get_base_model) else model
    return found


@contextlib.contextmanager
def fused(model: nn.Module, known: list[Any] | None = None) -> Iterator[Any]:
    """``model`` with a fused head, as it was afterwards.

    Args:
        known: empty at first, and then what the model was found to make of its head's outputs, so
            that it is measured once.
    """
    owner: Any = base_model(model)
    before = vars(owner).get("forward")
    state = vars(fuse_lm_head(owner))[STATE]
    if known:
        (state.measured,) = known
    try:
        yield owner
        if known is not None:
            known[:] = [state.measured]
    finally:
        if vars(owner).get("forward") is not before:
            unfuse_lm_head(owner)


@torch.no_grad()
def score_responses(
    model: nn.Module, batch: Mapping[str, Any], *, hidden: bool = False
) -> Responses:
    """Of a batch with ``input_ids``, ``attention_mask`` and labels, in evaluation mode.

    Args:
        model: with a fused head: ``with fused(model) as model``.
        hidden: whether the states before the head are wanted.
    """
    labels = scored_labels(batch)
    inputs = moved(
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch.get("attention_mask"),
            "labels": labels,
        },
        model,
    )
    states: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        states.append(given[0])

    hook = None
    if hidden:
        hook = model.get_output_embeddings().register_forward_pre_hook(look)  # type: ignore[operator]
    was_training = model.training
    model.eval()
    try:
        output = model(**inputs, fused_lm_head=True)
    finally:
        model.train(was_training)
        if hook is not None:
            hook.remove()
    mask = inputs["labels"][:, 1:] != IGNORE
    # The last: before its first fused call a model is measured, on a few inputs.
    found = states[-1].view(*inputs["input_ids"].shape, -1)[:, :-1] if states else None
    return Responses(output.log_probs, mask, found)
