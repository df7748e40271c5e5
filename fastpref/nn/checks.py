# SPDX-License-Identifier: Apache-2.0
"""Checks of what the modules are called with, by the names of their arguments."""

from __future__ import annotations

from torch import Tensor

from ..objectives.checks import no_tensor
from ..scoring.whole import check_whole


def check_head(
    states: Tensor,
    weight: Tensor,
    target: Tensor,
    names: tuple[str, str, str] = ("_input", "lin_weight", "target"),
) -> None:
    """Raise unless these are hidden states (B, T, H), a head (V, H) and its targets (B, T)."""
    _check_kinds(names, (states, weight, target))
    if states.dim() != 3 or target.dim() != 2 or states.shape[:2] != target.shape:
        raise ValueError(
            f"{names[0]} must be (B, T, H) and {names[2]} (B, T), got {tuple(states.shape)} and "
            f"{tuple(target.shape)}; mind the order of the arguments: {names[1]} is "
            f"{tuple(weight.shape)}"
        )
    _check_weight(names, states, weight)


def check_tokens(model: str, states: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Raise unless these are hidden states (..., H) of ``model``, its head (V, H) and labels
    (...)."""
    names = (f"{model}_input", f"{model}_weight", "true_labels")
    _check_kinds(names, (states, weight, labels))
    if states.shape[:-1] != labels.shape:
        raise ValueError(
            f"{names[0]} must be (..., H) and true_labels (...), got {tuple(states.shape)} and "
            f"{tuple(labels.shape)}; shift both"
        )
    _check_weight(names, states, weight)


def _check_kinds(names: tuple[str, str, str], values: tuple[Tensor, Tensor, Tensor]) -> None:
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise no_tensor(name, value)


def _check_weight(names: tuple[str, str, str], states: Tensor, weight: Tensor) -> None:
    check_whole(names[1], weight)
    if weight.dim() != 2 or weight.shape[1] != states.shape[-1]:
        raise ValueError(
            f"{names[1]} must be (V, H) with H = {states.shape[-1]} of {names[0]}, got "
            f"{tuple(weight.shape)}; pass the weight as nn.Linear stores it"
        )


def check_reference(ref_input: Tensor | None, ref_weight: Tensor | None, target: Tensor) -> None:
    """Raise unless there is a reference that can be scored; without ``ref_weight`` the policy's
    head does it."""
    if ref_input is None:
        raise ValueError(
            "use_ref_model=True compares with a reference: pass ref_input, got None, or construct "
            "the loss with use_ref_model=False"
        )
    if ref_weight is not None:
        check_head(ref_input, ref_weight, target, ("ref_input", "ref_weight", "target"))


def check_rows(name: str, value: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise unless ``value`` is a tensor of one of ``shapes``."""
    if not isinstance(value, Tensor):
        raise no_tensor(name, value)
    if tuple(value.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must be {wanted}, got {tuple(value.shape)}")
