# SPDX-License-Identifier: Apache-2.0
"""Checks of what the modules are called with, by the names of their arguments."""

from __future__ import annotations

from torch import Tensor


def check_head(
    states: Tensor,
    weight: Tensor,
    target: Tensor,
    names: tuple[str, str, str] = ("_input", "lin_weight", "target"),
) -> None:
    """Raise unless these are hidden states (B, T, H), a head (V, H) and its targets (B, T)."""
    for name, value in zip(names, (states, weight, target), strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    shapes = [tuple(one.shape) for one in (states, weight, target)]
    if states.dim() != 3 or target.dim() != 2 or states.shape[:2] != target.shape:
        raise ValueError(
            f"{names[0]} must be (B, T, H) and {names[2]} (B, T), got {shapes[0]} and {shapes[2]}; "
            f"mind the order of the arguments: {names[1]} is {shapes[1]}"
        )
    if weight.dim() != 2 or weight.shape[1] != states.shape[2]:
        raise ValueError(
            f"{names[1]} must be (V, H) with H = {states.shape[2]} of {names[0]}, got {shapes[1]}; "
            "pass the weight as nn.Linear stores it"
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
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(value.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must be {wanted}, got {tuple(value.shape)}")
