# SPDX-License-Identifier: Apache-2.0
"""When a reference moves during a training, and how a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.tensor import DTensor

from ..objectives.checks import is_integer
from .adapters import check_adapter, named_adapter
from .modules import bare
from .update import check_decay, named, update_

Every = int | Literal["epoch"] | Iterable[int]
FILE = "reference.pt"


class MovingReference:
    """A reference and its schedule, without a trainer: ``ReferenceCallback`` has one."""

    def __init__(self, reference: nn.Module | str, decay: float, every: Every) -> None:
        if not isinstance(reference, (nn.Module, str)):
            raise TypeError(
                "reference must be a torch.nn.Module, or the name of an adapter of the policy, got "
                f"{type(reference).__name__}"
            )
        check_decay(decay)
        self.reference, self.decay = reference, decay
        self.every = _checked(every)

    def after_step(self, policy: nn.Module, step: int) -> None:
        """Of the optimizer, counted from 1."""
        if isinstance(self.every, int):
            due = step % self.every == 0
        else:
            due = self.every != "epoch" and step in self.every
        if due:
            self.move(policy)

    def after_epoch(self, policy: nn.Module) -> None:
        if self.every == "epoch":
            self.move(policy)

    def move(self, policy: nn.Module) -> None:
        if isinstance(self.reference, str):
            policy = bare(policy)
            followed = self._followed(policy)
            mine, theirs = (named_adapter(policy, one) for one in (self.reference, followed))
            update_(mine, theirs, decay=self.decay)
        else:
            update_(self.reference, policy, decay=self.decay)

    def check(self, policy: nn.Module) -> None:
        """That there is a reference in this policy, where it is an adapter."""
        if isinstance(self.reference, str):
            check_adapter(bare(policy), self.reference, "reference")
            self._followed(bare(policy))

    def save(self, folder: Path, policy: nn.Module, *, writes: bool) -> None:
        """On all ranks; ``writes`` on the one that writes what is not sharded."""
        tensors = self._tensors(policy)
        if any(isinstance(one, DTensor) for one in tensors.values()):
            save_sharded(tensors, checkpoint_id=folder)
        elif writes:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({name: one.detach().cpu() for name, one in tensors.items()}, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path, policy: nn.Module) -> None:
        """In place, what ``save`` wrote."""
        tensors = self._tensors(policy)
        if any(isinstance(one, DTensor) for one in tensors.values()):
            load_sharded(tensors, checkpoint_id=folder)
            return
        stored = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        shapes = [{name: one.shape for name, one in each.items()} for each in (stored, tensors)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"reference must be the model whose weights lie in {folder}, got one with other "
                "names or shapes"
            )
        for name, one in tensors.items():
            one.copy_(stored[name])

    def _tensors(self, policy: nn.Module) -> dict[str, Tensor]:
        if isinstance(self.reference, str):
            return dict(named_adapter(bare(policy), self.reference))
        return named(bare(self.reference), "reference")

    def _followed(self, policy: Any) -> str:
        """The adapter that is trained."""
        active = [one for one in policy.active_adapters if one != self.reference]
        if len(active) != 1:
            raise ValueError(
                "reference must be an adapter beside the one that is trained, got "
                f"{self.reference!r} where {policy.active_adapters} are active; activate the "
                "policy's with model.set_adapter"
            )
        return str(active[0])


def _checked(every: Every) -> int | Literal["epoch"] | frozenset[int]:
    if is_integer(every):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        return int(every)
    if isinstance(every, str):
        if every != "epoch":
            raise ValueError(f"every must be a number of steps, 'epoch' or steps, got {every!r}")
        return "epoch"
    if not isinstance(every, Iterable):
        raise TypeError(
            "every must be a number of optimizer steps, 'epoch', or the steps themselves, got "
            f"{type(every).__name__}"
        )
    steps = list(every)
    if not steps or not all(is_integer(one) and one >= 1 for one in steps):
        raise ValueError(f"every must hold optimizer steps, counted from 1, got {steps}")
    return frozenset(int(one) for one in steps)
