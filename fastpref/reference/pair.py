# SPDX-License-Identifier: Apache-2.0
"""Two LoRA adapters that chase each other: OFS-DPO's fast and slow module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..objectives.checks import check_group, is_number
from .adapters import adapter_tensors, check_adapter, named_adapter
from .modules import bare

Role = Literal["fast", "slow"]


class AdapterPair:
    """A fast and a slow LoRA adapter of one model, which exchange their roles when the slow one
    does better (OFS-DPO, Qi et al. 2024, arXiv:2406.05534).

    Here are the two modules, their learning rates and the exchange; the loss of each is the
    objective ``ofs_dpo`` with its ``role``. That the lower loss makes an adapter the fast one is a
    third party's account of the paper; how often to look is the caller's.

        pair = AdapterPair(model, fast="a", slow="b")
        optimizer = torch.optim.AdamW(pair.parameter_groups(fast_lr=1e-4, slow_lr=2e-5))
        with pair.active("fast"):
            ...                                      # the policy is the fast adapter
        pair.record(fast_dpo_loss, slow_dpo_loss)
        pair.switch(optimizer)                       # now and then

    Where the reference is the model under ``disable_adapter``, call it before the two: PEFT freezes
    the adapter that is not active when that ends, and a gradient taken later leaves it out. FSDP2
    in mixed precision takes the dtype of gradients from the weights that train at the very first
    forward: let that be one under ``active``, without gradients.

    Args:
        model: PEFT's model with two LoRA adapters of the same shapes.
        fast: name of the adapter that begins as the fast one.
        slow: name of the other.
    """

    def __init__(self, model: Any, *, fast: str = "fast", slow: str = "slow") -> None:
        check_adapter(model, fast, "fast")
        check_adapter(model, slow, "slow")
        if fast == slow:
            raise ValueError(f"fast and slow must be two adapters, got {fast!r} for both")
        shapes = [
            {name: tuple(one.shape) for name, one in named_adapter(model, adapter).items()}
            for adapter in (fast, slow)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"slow must have weights named and shaped as those of fast, got adapters {fast!r} "
                f"and {slow!r} that differ; add both with the same LoraConfig"
            )
        self.model = model
        self.fast, self.slow = fast, slow
        self._losses: Tensor | None = None  # (2,) float64, summed since the last decision

    def parameters(self, role: Role) -> list[nn.Parameter]:
        """The weights of the adapter that has this role now, its shards under FSDP2."""
        return adapter_tensors(self.model, self._name(role))

    def parameter_groups(self, *, fast_lr: float, slow_lr: float) -> list[dict[str, Any]]:
        """For any torch optimizer: one group an adapter, whose ``lr`` moves with the roles.

        Args:
            fast_lr: learning rate of the adapter that is fast, >= 0.
            slow_lr: that of the slow one, >= 0.
        """
        for argument, value in (("fast_lr", fast_lr), ("slow_lr", slow_lr)):
            if not is_number(value):
                raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
            if not value >= 0:
                raise ValueError(f"{argument} must be >= 0, got {value!r}")
        return [
            {"params": self.parameters("fast"), "lr": fast_lr, "adapter": self.fast},
            {"params": self.parameters("slow"), "lr": slow_lr, "adapter": self.slow},
        ]

    @contextlib.contextmanager
    def active(self, role: Role) -> Iterator[None]:
        """The adapter of this role alone takes part in the model's forward; both keep training."""
        bare(self.model)  # gathered weights would not keep that they train
        before = self.model.active_adapter
        self._activate(self._name(role))
        try:
            yield
        finally:
            self._activate(before)

    def record(self, fast_loss: Tensor, slow_loss: Tensor) -> None:
        """Take in the losses of a batch for the next ``switch``: ``fast_loss`` under the fast
        adapter, ``slow_loss`` under the slow one, of any shape.

        Of the same objective for both (``dpo``): those of ``ofs_dpo`` hold the chase with opposite
        signs, and the slow one's is the lower by that alone.
        """
        both = []
        for argument, one in (("fast_loss", fast_loss), ("slow_loss", slow_loss)):
            if not isinstance(one, Tensor):
                raise TypeError(f"{argument} must be a tensor, got {type(one).__name__}")
            if not one.numel():
                raise ValueError(f"{argument} must be of at least one pair, got {tuple(one.shape)}")
            both.append(one.detach().double().mean())
        sums = torch.stack(both)
        self._losses = sums if self._losses is None else self._losses + sums

    def switch(
        self,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        *,
        dp_group: dist.ProcessGroup | None = None,
    ) -> bool:
        """Exchange the roles if the slow adapter's recorded loss is lower; then record anew.

        Args:
            optimizer: of ``parameter_groups``, as in ``swap``; and ``lr_scheduler``.
            dp_group: all its ranks decide by the sum of their losses, and so alike.

        Returns:
            Whether they were exchanged; not where nothing was recorded.
        """
        check_group(dp_group, "dp_group")
        losses, self._losses = self._losses, None
        if losses is None:
            return False
        if dp_group is not None:
            dist.all_reduce(losses, group=dp_group)
        fast, slow = losses.tolist()
        if slow < fast:
            self.swap(optimizer, lr_scheduler)
        return bool(slow < fast)

    def swap(self, optimizer: Any = None, lr_scheduler: Any = None) -> None:
        """Exchange the roles, and the learning rates of the optimizer's groups with them.

        An optimizer's moments stay with their weights. A scheduler of torch goes in as
        ``lr_scheduler``, as it sets learning rates from its own copy.

        Raises:
            ValueError: the optimizer's groups are not those of ``parameter_groups``.
        """
        if optimizer is not None:
            self._swap_rates(optimizer, lr_scheduler)
        self.fast, self.slow = self.slow, self.fast

    def state_dict(self) -> dict[str, Any]:
        """Roles and recorded losses, in numbers that JSON holds to the bit. The weights are the
        model's, the learning rates the optimizer's."""
        losses = None if self._losses is None else self._losses.tolist()
        return {"fast": self.fast, "slow": self.slow, "losses": losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Args:
            state: what ``state_dict`` returned, of a pair of the same two adapters.
        """
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            got = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"state must be what AdapterPair.state_dict() returned, got {got or 'nothing'}"
            )
        losses = state["losses"]
        two = isinstance(losses, (list, tuple)) and len(losses) == 2
        if losses is not None and not (two and all(map(is_number, losses))):
            raise ValueError(f"state's losses must be two numbers or None, got {losses!r}")
        if {state["fast"], state["slow"]} != {self.fast, self.slow}:
            raise ValueError(
                f"state must be of the adapters {self.fast!r} and {self.slow!r}, got "
                f"{state['fast']!r} and {state['slow']!r}"
            )
        self.fast, self.slow = state["fast"], state["slow"]
        self._losses = None
        if losses is not None:
            where = self.parameters("fast")[0].device
            self._losses = torch.tensor(losses, dtype=torch.float64, device=where)

    def _name(self, role: Role) -> str:
        if role not in ("fast", "slow"):
            raise ValueError(f"role must be 'fast' or 'slow', got {role!r}")
        return self.fast if role == "fast" else self.slow

    def _activate(self, adapter: Any) -> None:
        # PEFT freezes every adapter that is not active.
        self.model.set_adapter(adapter)
        for name in (self.fast, self.slow):
            for one in named_adapter(self.model, name).values():
                one.requires_grad_(True)

    def _swap_rates(self, optimizer: Any, lr_scheduler: Any) -> None:
        groups = getattr(optimizer, "param_groups", None)
        if groups is None:
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        places = [
            place
            for place, one in enumerate(groups)
            if one.get("adapter") in (self.fast, self.slow)
        ]
        if len(places) != 2:
            raise ValueError(
                "optimizer must have one group an adapter, as parameter_groups makes them, got "
                f"{len(places)} such groups"
            )
        a, b = places
        for name in ("lr", "initial_lr"):
            if name in groups[a]:
                groups[a][name], groups[b][name] = groups[b][name], groups[a][name]
        if lr_scheduler is not None:
            bases = getattr(lr_scheduler, "scheduler", lr_scheduler).base_lrs
            bases[a], bases[b] = bases[b], bases[a]
