# SPDX-License-Identifier: Apache-2.0
"""What goes into scoring beside tensors: options, dtypes, and the map of logits."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..objectives.checks import hint, is_integer

Backend = Literal["auto", "torch", "cpp", "rows", "triton", "cuda"]
Schedule = Literal["auto", "direct", "keep", "recompute", "batches"]

BACKENDS: tuple[str, ...] = ("auto", "torch", "cpp", "rows", "triton", "cuda")
SCHEDULES: tuple[str, ...] = ("auto", "direct", "keep", "recompute", "batches")
DTYPES: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions:
    """How to score. Every default lets fastpref choose; no option changes a result by more than
    rounding.

    - ``backend``: "torch" (any device), "cpp" (CPU); on a GPU "rows" (torch's products, one Triton
      pass over their rows), "triton" (products and exponentials in one kernel), "cuda" (the pass in
      CUDA C++); or "auto".
    - ``memory_budget``: workspace in bytes. None takes a sixteenth of the device's total memory, on
      CPU of what the container is allowed where that is less, so that the choice of schedule
      depends on shapes and options alone. Below the least tile, the
      least tile is used. Where memory runs out all the same (torch.OutOfMemoryError), a call runs
      again with less, down to the least tile, and logger ``fastpref`` says so once; not under
      ``tp_group``, where all ranks must run alike, nor while a CUDA graph is captured. Inside
      torch.utils.checkpoint(use_reentrant=False), whose second forward must save what the first
      did, give a budget that fits.
    - ``schedule``: "direct" forms d logp / d hidden in the forward pass; "keep" keeps exponentials
      of as many rows as the budget holds and recomputes the rest; "recompute" keeps none;
      "batches", of ``preference_loss`` only, takes the loss's gradient batch by batch in the
      forward pass, or under torch.func in two passes; or "auto".
    - ``chunk_rows``: rows of one product at most. None: as many as the schedule finds best.
    - ``max_scored``: upper bound on the number of scored tokens. On CUDA it saves the one host read
      that packing scored rows otherwise needs. More scored tokens than this raise ValueError on CPU
      and give NaN on CUDA.
    """

    backend: Backend = "auto"
    memory_budget: int | None = None
    schedule: Schedule = "auto"
    chunk_rows: int | None = None
    max_scored: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(BACKENDS)}; got {self.backend!r}"
                f"{hint(self.backend, BACKENDS)}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}"
                f"{hint(self.schedule, SCHEDULES)}"
            )
        for name in ("memory_budget", "chunk_rows", "max_scored"):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_integer(value):
                raise TypeError(f"{name} must be an int or None; got {type(value).__name__}")
            least = 0 if name == "max_scored" else 1
            if value < least:
                raise ValueError(
                    f"{name} must be {'0 or ' if least == 0 else ''}positive; got {value}. "
                    "Leave it None to let fastpref choose"
                )
            if not isinstance(value, int):
                object.__setattr__(self, name, int(value))  # what operators take


DEFAULT_OPTIONS = ScoringOptions()


class LogitMap(NamedTuple):
    """t = scale z, with a cap t = cap tanh(scale z / cap), of a raw logit z = product + bias; times
    the factor of its row where there is one."""

    scale: float  # logit_scale / temperature
    cap: float  # softcap / temperature, 0 for none
    # (rows,), statistics dtype: 1 / temperature where each row has its own, which the two numbers
    # are without then.
    factor: Tensor | None = None

    def of_rows(self, rows: slice | Tensor) -> LogitMap:
        return self if self.factor is None else self._replace(factor=self.factor[rows])

    @property
    def of_all_rows(self) -> LogitMap:
        """Without their factors."""
        return self._replace(factor=None)

    def rate(self, like: Tensor) -> float | Tensor:
        """What dt/dz is a multiple of, to multiply ``like`` (rows, ...) by."""
        if self.factor is None:
            return self.scale
        return self._factor(like) * self.scale

    def _factor(self, like: Tensor) -> float | Tensor:
        return 1.0 if self.factor is None else self.factor.view(-1, *[1] * (like.dim() - 1))

    def logit(self, raw: Tensor) -> Tensor:
        if self.cap == 0:
            return raw * self.rate(raw)
        capped = torch.tanh(raw * (self.scale / self.cap)) * self.cap
        return capped if self.factor is None else capped * self._factor(raw)

    def slope(self, raw: Tensor) -> Tensor:
        """dt/dz over ``rate``: 1 - tanh^2 = 1 / cosh^2 under a cap, else 1."""
        if self.cap == 0:
            return torch.ones_like(raw)
        return torch.cosh(raw * (self.scale / self.cap)).square().reciprocal()


# Changes nothing. To enter a context that would change nothing either takes as long as a small
# product.
AS_IT_IS = contextlib.nullcontext()


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``tensor.to(dtype)``, which takes its time where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probabilities and sums for products in ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
