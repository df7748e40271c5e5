# SPDX-License-Identifier: Apache-2.0
"""The time that a trainer spends between its backbone and its loss, whatever computes the loss."""

from __future__ import annotations

import functools
from typing import Any

from ...demo.measure import now


class HeadClock:
    """Adds up what lies between the last hidden states and the loss: forward from the end of a
    backbone to the start of the next one or to the loss, backward from the loss to the gradient of
    the hidden states."""

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
