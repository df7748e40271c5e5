# SPDX-License-Identifier: Apache-2.0
"""What a fused call is asked for: targets, statistics, temperature."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# The names of a call's outputs, and those of linear_logprob.
OUTPUTS = {
    "log_probs": "logp",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}
IGNORED = -100


class Request(NamedTuple):
    """Of one call."""

    labels: Tensor  # (B, T), as the caller gave them
    shifted: bool  # whether labels[:, t] is what position t predicts, not t - 1
    names: tuple[str, ...]  # of OUTPUTS, log_probs first
    temperature: float | Tensor
    items: Tensor | int | None  # what the sum of losses is divided by

    @property
    def target(self) -> Tensor:
        """(B, T - 1), or (B, T) where labels came shifted."""
        return self.labels if self.shifted else self.labels[:, 1:]

    @property
    def wanted(self) -> tuple[str, ...]:
        """The fields of TokenScores in the order of ``names``."""
        return tuple(OUTPUTS[name] for name in self.names)

    def positions(self, states: Tensor) -> Tensor:
        """Of (B, S, ...) those that predict ``target``. Prompt tuning puts positions in front, so
        that labels belong to the last.

        Raises:
            ValueError: other sequences than those of labels, or fewer positions.
        """
        rows, length = self.labels.shape
        if states.dim() != 3 or states.shape[0] != rows or states.shape[1] < length:
            raise ValueError(
                f"labels are {tuple(self.labels.shape)}, and the output head got hidden states "
                f"{tuple(states.shape)}: expected as many sequences of at least as many positions. "
                "Pass labels of the shape of input_ids, and no logits_to_keep"
            )
        return states[:, states.shape[1] - length : states.shape[1] - (not self.shifted)]

    def loss(self, log_probs: Tensor) -> Tensor:
        """Mean negative log-likelihood, or the sum over ``items``."""
        if self.items is None:
            return -log_probs.sum() / (self.target != IGNORED).sum().to(log_probs.device)
        items = self.items
        return -log_probs.sum() / (
            items.to(log_probs.device) if isinstance(items, Tensor) else items
        )


def take_request(arguments: dict[str, Any]) -> Request:
    """The request among the keyword arguments of a call, from which it is removed.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    labels, fused_labels = arguments.pop("labels", None), arguments.pop("fused_labels", None)
    shift_labels = arguments.pop("shift_labels", None)
    outputs = arguments.pop("outputs", ("log_probs",))
    temperature = arguments.pop("temperature", 1.0)
    items = arguments.pop("num_items_in_batch", None)
    given = shift_labels if shift_labels is not None else labels
    given = fused_labels if given is None else given
    if given is None:
        raise ValueError(
            "labels is missing: fused_lm_head=True scores labels, and got none. Pass labels (B, T) "
            "as for the model's own loss (fused_labels where a trainer takes labels out of the "
            "inputs), or leave fused_lm_head out for logits"
        )
    if not isinstance(given, Tensor) or given.dim() != 2 or given.dtype != torch.int64:
        came = type(given).__name__
        if isinstance(given, Tensor):
            came = f"{tuple(given.shape)} {given.dtype}"
        raise ValueError(
            f"labels must be (B, T) int64, -100 where nothing is scored; got {came}. "
            "Pass a tensor shaped like input_ids"
        )
    if isinstance(outputs, str) or any(name not in OUTPUTS for name in outputs):
        raise ValueError(
            f"outputs must be a tuple of names among {', '.join(OUTPUTS)}; got {outputs!r}. "
            'Pass for example outputs=("entropy",)'
        )
    names = ("log_probs", *(name for name in OUTPUTS if name in outputs and name != "log_probs"))
    return Request(given, shift_labels is not None, names, temperature, items)
