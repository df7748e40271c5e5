# SPDX-License-Identifier: Apache-2.0
"""What a training takes: clocks for its head and its steps, its losses, and the memory of the
process."""

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


def now() -> float:
    """Seconds on a clock, all work given to the device done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class HeadClock:
    """Adds up the time between the last hidden states and the loss, whatever computes it: forward
    from the end of a backbone to the start of the next one or to the loss, backward from the loss
    to the gradient of the hidden states."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None

    def attach(self, trainer: Any) -> None:
        """Time ``trainer``: its model, also one within PEFT's, and its reference model."""
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                base = model.get_base_model() if hasattr(model, "get_base_model") else model
                base.base_model.register_forward_pre_hook(self._stop)
                base.base_model.register_forward_hook(self._after_backbone)
        compute_loss = trainer.compute_loss

        @functools.wraps(compute_loss)
        def timed(*args: Any, **keywords: Any) -> Any:
            found = compute_loss(*args, **keywords)
            self._stop()
            loss = found[0] if isinstance(found, tuple) else found
            if loss.requires_grad:
                loss.register_hook(self._start)
            return found

        trainer.compute_loss = timed

    def _after_backbone(self, module: Any, args: Any, outputs: Any) -> None:
        states = outputs.last_hidden_state
        if states.requires_grad:
            states.register_hook(self._stop)
        self._start()

    def _start(self, *_: Any) -> None:
        self._began = now()

    def _stop(self, *_: Any) -> None:
        if self._began is not None:
            self.seconds += now() - self._began
            self._began = None


class StepClock(TrainerCallback):
    """The seconds of every step, which is taken within ``turn``, and those of them in the head."""

    def __init__(self, head: HeadClock, turn: AbstractContextManager[object]) -> None:
        self.head, self.turn = head, turn
        self.step_seconds: list[float] = []
        self.head_seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.turn.__enter__()
        self.head.seconds = 0.0
        self._began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_seconds.append(now() - self._began)
        self.turn.__exit__(None, None, None)
        self.head_seconds.append(self.head.seconds)


def measured(trainer: Any, turn: AbstractContextManager[object] | None = None) -> dict[str, Any]:
    """Train, each step within ``turn``, and return the losses of all steps, their seconds and those
    of them in the head, and bytes of memory before and at the peak."""
    losses: list[torch.Tensor] = []
    head = HeadClock()
    head.attach(trainer)
    trainer.compute_loss = _recorded(trainer.compute_loss, losses)
    steps = StepClock(head, nullcontext() if turn is None else turn)
    trainer.add_callback(steps)
    before = memory("VmRSS")
    trainer.train()
    return {
        "losses": [loss.item() for loss in losses],
        "step_seconds": steps.step_seconds,
        "head_seconds": steps.head_seconds,
        "memory_before": before,
        "memory_peak": memory("VmHWM"),
    }


def _recorded(compute_loss: Callable[..., Any], losses: list[torch.Tensor]) -> Callable[..., Any]:
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
