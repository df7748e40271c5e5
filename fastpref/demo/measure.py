# SPDX-License-Identifier: Apache-2.0
"""Clocks for the head and the steps of a trainer, and the memory of a process."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback


def now() -> float:
    """Seconds on a clock, all work given to the device done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class HeadClock:
    """Adds up the time that models spend between their backbone and their log-probabilities.

    The forward counts from the end of the backbone to the end of the model's forward, the backward
    from the gradient of the log-probabilities to that of the last hidden state. Both hold for any
    head, whatever it is made of.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def attach(self, model: Any) -> None:
        """Time the calls of `model`, whose forward returns ``log_probs``."""
        forward = model.forward

        @functools.wraps(forward)
        def timed(*args: Any, **keywords: Any) -> Any:
            outputs = forward(*args, **keywords)
            self._stop()
            if outputs.log_probs.requires_grad:
                outputs.log_probs.register_hook(self._start)
            return outputs

        model.forward = timed
        model.base_model.register_forward_hook(self._after_backbone)

    def _after_backbone(self, module: Any, args: Any, outputs: Any) -> None:
        if outputs.last_hidden_state.requires_grad:
            outputs.last_hidden_state.register_hook(self._stop)
        self._start()

    def _start(self, *_: Any) -> None:
        self._began = now()

    def _stop(self, *_: Any) -> None:
        self.seconds += now() - self._began


class Seconds(Protocol):
    """What adds up seconds and may be set back."""

    seconds: float


class StepClock(TrainerCallback):
    """The seconds of every step, and those of them in the head."""

    def __init__(self, head: Seconds) -> None:
        self.head = head
        self.step_seconds: list[float] = []
        self.head_seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.head.seconds = 0.0
        self._began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_seconds.append(now() - self._began)
        self.head_seconds.append(self.head.seconds)


def recorded(compute_loss: Callable[..., Any], losses: list[torch.Tensor]) -> Callable[..., Any]:
    """`compute_loss`, keeping every loss unrounded; the log that a trainer keeps is rounded."""

    @functools.wraps(compute_loss)
    def recording(*args: Any, **keywords: Any) -> Any:
        loss = compute_loss(*args, **keywords)
        losses.append(loss.detach())
        return loss

    return recording


def memory(field: str) -> int:
    """Bytes of this process's memory: ``VmHWM`` at its peak, ``VmRSS`` now; 0 where unknown.

    With a CUDA device, bytes of the tensors on it instead.
    """
    if torch.cuda.is_available():
        return (
            torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
        )
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
