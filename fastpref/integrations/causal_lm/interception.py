# SPDX-License-Identifier: Apache-2.0
"""Standing in for parts of a model while it runs: its output head, and its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .head import Head


@contextlib.contextmanager
def answered(head: Head, answer: Callable[..., Any], leave: Callable[[Any], Any]) -> Iterator[None]:
    """Within it the head runs ``answer(own, hidden)``, ``own`` being its forward, and gives its
    caller ``leave`` of what that returned.

    ``answer`` runs where the head's parameters are whole, and hooks on the head see what it
    returns: FSDP and ZeRO gather parameters for backward when a gradient arrives there. ``leave``
    comes after all hooks.
    """
    inner = head.inner
    # accelerate has put its hook (devices, offloading) into ``forward`` and kept what was there.
    name = "_old_forward" if hasattr(inner, "_hf_hook") else "forward"
    found = vars(inner).get(name)
    own = getattr(inner, name)
    setattr(inner, name, lambda *args, **kwargs: answer(own, *args, **kwargs))
    hook = head.outer.register_forward_hook(lambda module, args, output: leave(output))
    try:
        yield
    finally:
        hook.remove()
        if found is None:
            delattr(inner, name)
        else:
            setattr(inner, name, found)


@contextlib.contextmanager
def loss_left_out(model: nn.Module) -> Iterator[list[None]]:
    """Within it the model's loss function gives 0: its loss is what it adds to that. Yields a list
    that grows with each call."""
    calls: list[None] = []

    def nothing(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return torch.zeros((), device=logits.device, dtype=torch.float32)

    found = vars(model).get("_loss_function")
    model._loss_function = nothing  # type: ignore[assignment]
    try:
        yield calls
    finally:
        if found is None:
            del model._loss_function
        else:
            model._loss_function = found
