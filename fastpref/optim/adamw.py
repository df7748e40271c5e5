# SPDX-License-Identifier: Apache-2.0
"""AdamW in a few columns of the discrete cosine transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import is_integer, is_number
from ..scoring.basis import WeightGradBasis
from ..scoring.products import split
from .dct import dct_matrix

SLAB_BYTES = 1 << 24  # of the weight's rows that are updated at a time


class DCTAdamW(torch.optim.Optimizer):
    """AdamW of one weight (V, H) on its gradient's projection on ``rank`` columns of the DCT-II.

    With G the gradient, C the transform and Q its chosen columns, moments are those of S = G Q,
    (V, rank) in float32, and the weight moves by -lr step(S) Q^T, decayed by 1 - lr weight_decay.
    ``basis`` goes to ``weight_grad_basis`` of ``linear_logprob`` or ``preference_loss``, read anew
    for every step; backward adds S to ``gradient``, which ``zero_grad()`` empties.

    In the first step and every ``update_every`` steps after it, the squared norms of the columns of
    G C are added up too, one product more, and from the next step on Q are the columns of the
    largest ones; the first step is in those of the lowest frequencies. A column that stays keeps
    its moments and its age, for bias correction; a new one starts with none.

    Of DCT-AdamW (arXiv:2505.17967) it is the projection, the choice by norms and moments that
    follow their columns; it is neither its error feedback nor Trion, and it chooses for the next
    step where that chooses for the same one.

    Under data parallelism reduce ``gradient`` and ``norms`` (where not None) over the ranks before
    ``step()``; where the vocabulary is sharded ``norms`` alone, so that all choose alike.

    Args:
        weight: (V, H), of a head that is not tied to an embedding that trains; it must not need a
            gradient.
        rank: columns, at most H.
        lr, betas, eps, weight_decay: as torch.optim.AdamW has them.
        update_every: steps between two choices.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        rank: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_every: int = 100,
    ) -> None:
        _check(weight, rank, lr, betas, eps, weight_decay, update_every)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([weight], defaults | {"update_every": update_every})
        vocab, width = weight.shape
        device = weight.device
        self.weight = weight
        self.gradient = torch.zeros((vocab, rank), dtype=torch.float32, device=device)
        self.norms: Tensor | None = torch.zeros(width, dtype=torch.float32, device=device)
        self._transform = dct_matrix(width, device=device)
        self.state[weight] = {
            "step": 0,
            "columns": torch.arange(rank, dtype=torch.int64, device=device),
            "age": torch.zeros(rank, dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(self.gradient),
            "exp_avg_sq": torch.zeros_like(self.gradient),
        }

    @property
    def columns(self) -> Tensor:
        """(rank,) int64, those of the transform in use, in ascending order."""
        columns: Tensor = self.state[self.weight]["columns"]
        return columns

    @property
    def basis(self) -> WeightGradBasis:
        """For the next backward."""
        chosen = self._transform[:, self.columns]
        if self.norms is None:
            return WeightGradBasis(chosen, self.gradient)
        return WeightGradBasis(chosen, self.gradient, self._transform, self.norms)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Empty ``gradient`` and ``norms``, in place: backward adds to them.

        Args:
            set_to_none: as other optimizers have it; changes nothing here.
        """
        self.gradient.zero_()
        if self.norms is not None:
            self.norms.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,), state = self.param_groups, self.state[self.weight]
        state["step"] += 1
        state["age"] += 1
        direction = _direction(self.gradient, state, group["betas"], group["eps"])
        self._move(direction, group["lr"], group["weight_decay"])
        if self.norms is not None:
            self._choose(state, self.norms)
        self._measure(state["step"], group["update_every"])
        return loss

    def _move(self, direction: Tensor, lr: float, weight_decay: float) -> None:
        back = self._transform[:, self.columns].t()
        weight = self.weight
        rows = max(1, SLAB_BYTES // (4 * weight.shape[1]))
        for at in split(0, weight.shape[0], rows):
            # Rounded once, where the weight is in 16 bits.
            own = weight[at].to(torch.promote_types(weight.dtype, torch.float32))
            moved = torch.addmm(
                own, direction[at].to(own.dtype), back.to(own.dtype), alpha=-lr,
                beta=1 - lr * weight_decay,
            )  # fmt: skip
            weight[at] = moved

    def _choose(self, state: dict[str, Any], norms: Tensor) -> None:
        """The columns of the largest norms; of those that stay, what is known of them."""
        old, rank = state["columns"], len(state["columns"])
        new = norms.topk(rank).indices.sort().values
        place = torch.full_like(norms, -1, dtype=torch.int64)
        place[old] = torch.arange(rank, dtype=torch.int64, device=old.device)
        place = place[new]
        stays = (place >= 0).to(state["age"].dtype)
        for name in ("age", "exp_avg", "exp_avg_sq"):
            state[name] = state[name][..., place.clamp(min=0)] * stays
        state["columns"] = new

    def _measure(self, steps: int, every: int) -> None:
        """Whether the next step does."""
        due, like = steps % every == 0, self._transform
        self.norms = like.new_zeros(like.shape[0], dtype=torch.float32) if due else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What ``state_dict()`` returned, of an optimizer of the same weight and rank; what
        backward has added since a step is not part of it."""
        states = state_dict.get("state") if isinstance(state_dict, dict) else None
        given = states.get(0) if isinstance(states, dict) else None
        if not isinstance(given, dict) or given.keys() != self.state[self.weight].keys():
            got = type(state_dict).__name__ if given is None else f"one with {', '.join(given)}"
            raise ValueError(
                f"state_dict must be what DCTAdamW.state_dict() returned, got {got}; another "
                "optimizer's state does not go on in this one"
            )
        shape = tuple(given["exp_avg"].shape)
        if shape != tuple(self.gradient.shape):
            raise ValueError(
                f"state_dict must be of a weight and rank with moments "
                f"{tuple(self.gradient.shape)}, got {shape}; make the optimizer with that rank"
            )
        super().load_state_dict(state_dict)
        # torch casts what it loads to the weight's dtype; moments are float32 beside any.
        self.state[self.weight] = {
            name: one.detach().clone().to(self.weight.device) if isinstance(one, Tensor) else one
            for name, one in given.items()
        }
        self._measure(given["step"], self.param_groups[0]["update_every"])
        self.zero_grad()


def _direction(
    gradient: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's, each column corrected by its own age."""
    first, second = betas
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    age: Tensor = state["age"]
    mean: Tensor = state["exp_avg"] / (1 - first**age)
    spread: Tensor = state["exp_avg_sq"] / (1 - second**age)
    return mean.div_(spread.sqrt_().add_(eps))


def _check(
    weight: Any, rank: Any, lr: Any, betas: Any, eps: Any, weight_decay: Any, update_every: Any
) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else weight
        raise TypeError(f"weight must be one floating-point tensor (V, H), got {got!r}")
    if weight.requires_grad:
        raise ValueError(
            "weight must not need a gradient, which this optimizer does without, got one that "
            "does; call weight.requires_grad_(False)"
        )
    for name, value in (("rank", rank), ("update_every", update_every)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if rank > weight.shape[1]:
        raise ValueError(
            f"rank must be at most the hidden size, {weight.shape[1]}, got {rank}; at that size "
            "train the weight with torch.optim.AdamW"
        )
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not is_number(value) or not value >= 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(is_number(one) and 0 <= one < 1 for one in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
