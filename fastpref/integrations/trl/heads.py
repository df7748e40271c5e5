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
from .joined import Form, check, rows_of
from .library import trl_utils

SETTINGS = "_fastpref_trl_head"  # the attribute of a model


@dataclass
class Settings:
    """What TRL asks for once, where ``fuse_lm_head`` takes it with every call."""

    temperature: float
    outputs: tuple[str, ...]
    fused: Callable[..., Any]  # the model's forward
    form: Form | None = None  # of batches, None: as they come
    checked: bool = False  # whether the model was seen to score that form right


class NoLayer:
    """No module is an instance of it: where TRL has PEFT's layers, to refuse them as heads."""


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    form: Form | None = None,
) -> None:
    """Let ``model(..., labels=labels, fused_lm_head=True)`` return TRL's FusedCausalLMOutput.

    Args:
        model: transformers' causal language model.
        temperature: logits are divided by it.
        cast_lm_head_to_fp32: False only.
        outputs: statistics to compute beside ``log_probs``.
        form: in which the model is given the batches of such calls.

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
    setattr(model, SETTINGS, Settings(temperature, tuple(outputs), fused, form))
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
        if kwargs.get("num_items_in_batch") is None:
            # TRL's mean of no tokens is 0.
            kwargs["num_items_in_batch"] = (_target(kwargs) != -100).sum().clamp(min=1)
        call = functools.partial(
            settings.fused,
            *args,
            fused_lm_head=True,
            outputs=settings.outputs,
            temperature=settings.temperature,
        )
        form = settings.form
        if form is None:
            output = call(**kwargs)
        else:
            rows = rows_of(form.setting, kwargs)
            settings.checked = settings.checked or check(self, call, form, rows)
            output = form.call(self, call, rows)
        values = {name: _as_trl_has(name, value) for name, value in output.items()}
        return trl_utils().FusedCausalLMOutput(**values)

    return forward


def _target(arguments: dict[str, Any]) -> Tensor:
    """The labels that are scored, whichever way they come."""
    for name in ("shift_labels", "labels", "fused_labels"):
        given: Tensor | None = arguments.get(name)
        if given is not None:
            return given if name == "shift_labels" else given[:, 1:]
    raise ValueError("labels is missing: fused_lm_head=True scores labels, and got none")


def _as_trl_has(name: str, value: Any) -> Any:
    """In float32, and the mean of logits without gradient."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach() if name == "mean_logits" else value
    return value.float() if value.dtype == torch.float64 else value
