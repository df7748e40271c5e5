# SPDX-License-Identifier: Apache-2.0
"""TRL's ``add_fused_lm_head`` on ``fuse_lm_head``: the model's own forward runs, and its head, with
whatever PEFT put there, is answered in place. TRL's multiplies the backbone's output by the head's
weight, which is wrong where a model does more on the way or PEFT changes the head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ... import fuse_lm_head
from .library import trl_utils

SETTINGS = "_fastpref_trl_head"  # the attribute of a model


@dataclass
class Settings:
    """What TRL asks for once, where ``fuse_lm_head`` takes it with every call."""

    temperature: float
    outputs: tuple[str, ...]
    fused: Callable[..., Any]  # the model's forward


class NoLayer:
    """No module is an instance of it: where TRL has PEFT's layers, to refuse them as heads."""


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Let ``model(..., labels=labels, fused_lm_head=True)`` return TRL's FusedCausalLMOutput.

    Args:
        model: transformers' causal language model.
        temperature: logits are divided by it.
        cast_lm_head_to_fp32: False only.
        outputs: statistics to compute beside ``log_probs``.

    Raises:
        ValueError: ``cast_lm_head_to_fp32``, or what ``fuse_lm_head`` refuses.
    """
    if cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32=True is not known to fuse_lm_head; got it with "
            "patch(fix_heads=True). Leave it out, since fastpref sums in float32 whatever the "
            "inputs, or load the model in float32, or call patch() without fix_heads"
        )
    fuse_lm_head(model)
    known = vars(model).get(SETTINGS)
    fused = model.forward if known is None else known.fused
    setattr(model, SETTINGS, Settings(temperature, tuple(outputs), fused))
    model.forward = MethodType(_forward_of(type(model)), model)  # type: ignore[arg-type]


@functools.cache
def _forward_of(kind: Any) -> Callable[..., Any]:
    """A function, not of one instance, so that a copy of a model has a method of its own; with the
    signature of the class's, by which ``generate`` and Trainer judge what the model takes."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        settings: Settings = getattr(self, SETTINGS)
        if not fused_lm_head:
            return settings.fused(*args, **kwargs)
        target: Tensor | None = kwargs.get("shift_labels")
        if target is None:
            target = kwargs["labels"][:, 1:]
        if kwargs.get("num_items_in_batch") is None:
            # TRL's mean of no tokens is 0.
            kwargs["num_items_in_batch"] = (target != -100).sum().clamp(min=1)
        asked = {"outputs": settings.outputs, "temperature": settings.temperature}
        output = settings.fused(*args, fused_lm_head=True, **asked, **kwargs)
        values = {name: _as_trl_has(name, value) for name, value in output.items()}
        return trl_utils().FusedCausalLMOutput(**values)

    return forward


def _as_trl_has(name: str, value: Any) -> Any:
    """In float32, and the mean of logits without gradient."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach() if name == "mean_logits" else value
    return value.float() if value.dtype == torch.float64 else value
