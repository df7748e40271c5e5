# SPDX-License-Identifier: Apache-2.0
"""The diagnostics of a training while it runs. This module needs transformers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..objectives.checks import is_integer, is_number
from .checks import check_batch
from .information import log_margin_order
from .lengths import length_bias
from .likelihood import Likelihoods, displacement
from .responses import fused, score_responses, scored_labels
from .similarity import ches

logger = logging.getLogger("fastpref")
# Not the callback's own name: where the Trainer is told to restore callbacks it makes new ones of
# those that it knows by name, without their probe.
KEPT = "PreferenceMonitor"


class _Measured(NamedTuple):
    likelihoods: Likelihoods
    lengths: tuple[Tensor, Tensor]  # of chosen and rejected responses
    ches: float


class PreferenceMonitorCallback(TrainerCallback):
    """Scores a few pairs that stay the same every so many steps, in TRL's trainers and in
    transformers' own, and logs what has become of them since the training began::

        monitor = PreferenceMonitorCallback(collator(rows[:8]))
        trainer = DPOTrainer(..., callbacks=[monitor])
        monitor.trainer = trainer       # for reports to trackers, see below

    - ``monitor/chosen_drop``, ``monitor/rejected_drop``, ``monitor/dispersion``,
      ``monitor/chosen_fell``, ``monitor/both_fell``: ``displacement``, dispersion with ``unseen``;
    - ``monitor/margin``, ``monitor/accuracy``: rewards against the model that the training began
      with, beta times the log-ratio; in a resumed training too, as what is compared with lies in
      the state of every checkpoint;
    - ``monitor/length_correlation``, ``monitor/length_slope``: ``length_bias`` of these margins;
    - ``monitor/margin_order``: ``log_margin_order`` of the log margins now and at the beginning;
    - ``monitor/ches``: the mean over the pairs, of the model as it is;
    - ``monitor/seconds``, ``monitor/share``: what this measurement took, and its share of the time
      since the last.

    It costs one forward pass over the probe every ``every`` steps, and one before the first. With
    a probe no larger than the batch of a step that is under 1% of the training at the default; the
    share that is logged says what it was. Under FSDP or ZeRO all ranks run it. What needs samples
    or every layer, ``did_entropy`` and ``spinal``, is not in it: ``python -m fastpref diagnose``.
    One in a training.

    Args:
        probe: a batch of chosen responses, then as many rejected ones, as the collators of
            fastpref and TRL make them: ``input_ids``, ``attention_mask``, and ``fused_labels``,
            ``completion_mask`` or ``labels``. Held-out pairs, as a rule.
        unseen: a batch of responses of which the training sees none.
        every: steps.
        beta: of the rewards.
        trainer: whose ``log`` is called. Without one, numbers join the next entry that the trainer
            logs, in ``state.log_history`` and for callbacks after this one: not for trackers, which
            come first.
    """

    def __init__(
        self,
        probe: Mapping[str, Any],
        *,
        unseen: Mapping[str, Any] | None = None,
        every: int = 100,
        beta: float = 0.1,
        trainer: Any = None,
    ) -> None:
        for name, batch in (("probe", probe), ("unseen", unseen)):
            if name == "probe" or batch is not None:
                check_batch(name, batch)
                scored_labels(batch, name=name)  # type: ignore[arg-type]
        if probe["input_ids"].shape[0] % 2:
            raise ValueError(
                "probe must hold chosen responses and as many rejected ones, got "
                f"{probe['input_ids'].shape[0]} rows"
            )
        if not is_integer(every) or every < 1:
            raise ValueError(f"every must be an int of at least 1, got {every!r}")
        if not is_number(beta) or not beta > 0:
            raise ValueError(f"beta must be a number greater than 0, got {beta!r}")
        if trainer is not None and not callable(getattr(trainer, "log", None)):
            raise TypeError(
                f"trainer must be a transformers Trainer, with log(), got {type(trainer).__name__}"
            )
        self.probe, self.unseen = probe, unseen
        self.every, self.beta, self.trainer = every, beta, trainer
        self._before: Likelihoods | None = None
        self._waiting: dict[str, float] = {}
        self._ended = 0.0  # when the last measurement did
        self._head: list[Any] = []  # what is known of it

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        kept = state.stateful_callbacks.get(KEPT)
        if state.global_step == 0 and kept is not None:
            raise ValueError(
                "callbacks must hold one PreferenceMonitorCallback, whose numbers have names of "
                "their own, got two; put all pairs into one probe"
            )
        if kept is None:
            measured = self._measure(given["model"])
            if measured is None:
                raise ValueError(
                    "probe and unseen must have finite log-probabilities under the model that the "
                    "training begins with, got an infinity or NaN; look at that model first"
                )
            self._before = measured.likelihoods
            both = self._before._asdict().items()
            kept = {name: None if one is None else one.tolist() for name, one in both}
            state.stateful_callbacks[KEPT] = kept
        else:
            self._before = self._restored(kept, next(given["model"].parameters()).device)
        self._ended = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % self.every:
            return
        began = time.perf_counter()
        measured = self._measure(given["model"])
        if measured is None:
            logger.warning(
                "step %d: log-probabilities of the monitor's probe are not finite, nothing is "
                "logged of it",
                state.global_step,
            )
            return
        values = self._values(measured)
        ended = time.perf_counter()
        values["monitor/seconds"] = ended - began
        values["monitor/share"] = (ended - began) / (ended - self._ended)
        self._ended = ended
        if self.trainer is not None:
            self.trainer.log(values)
        else:
            self._waiting = values

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self._waiting and logs is not None:
            logs.update(self._waiting)
            if state.log_history:
                state.log_history[-1].update(self._waiting)
            self._waiting = {}

    def _restored(self, kept: Mapping[str, Any], device: torch.device) -> Likelihoods:
        """What the training began with, of a checkpoint."""
        for name, batch, stored in (
            ("probe", self.probe, [*kept["chosen"], *kept["rejected"]]),
            ("unseen", self.unseen, kept["unseen"] or []),
        ):
            rows = 0 if batch is None else len(batch["input_ids"])
            if rows != len(stored):
                raise ValueError(
                    f"{name} must be that of the training which the checkpoint is of, "
                    f"{len(stored)} rows, got {rows}"
                )
        chosen, rejected, unseen = (
            torch.tensor(kept[name] or [], dtype=torch.float64, device=device)
            for name in Likelihoods._fields
        )
        return Likelihoods(chosen, rejected, None if self.unseen is None else unseen)

    def _measure(self, model: nn.Module) -> _Measured | None:
        """None where a log-probability is not finite: there is nothing to compare then, and a
        training does not end for its monitor."""
        # For a moment: TRL's own calls of its fused head must reach that.
        with fused(model, self._head) as own:
            found = score_responses(own, self.probe, hidden=True)
            unseen = None if self.unseen is None else score_responses(own, self.unseen).sums
        if found.hidden is None:
            raise RuntimeError("hidden states were asked for")
        sums = [found.sums] if unseen is None else [found.sums, unseen]
        if not bool(torch.cat(sums).isfinite().all()):
            return None
        halves = zip(found.hidden.chunk(2), found.mask.chunk(2), strict=True)
        (chosen, own_mask), (rejected, other_mask) = halves
        scores = ches(chosen, rejected, own_mask, other_mask)
        good, bad = found.sums.chunk(2)
        lengths = found.lengths.chunk(2)
        return _Measured(
            Likelihoods(good, bad, unseen), (lengths[0], lengths[1]), float(scores.mean())
        )

    def _values(self, now: _Measured) -> dict[str, float]:
        old, new = self._before, now.likelihoods
        if old is None:
            raise RuntimeError("the training has not begun")
        moved = displacement(old, new)
        values = {name: one for name, one in vars(moved).items() if one is not None}
        first, last = old.chosen - old.rejected, new.chosen - new.rejected
        margins = self.beta * (last - first)
        bias = length_bias(margins, *now.lengths)
        values |= {
            "margin": float(margins.mean()),
            "accuracy": float((margins > 0).to(torch.float64).mean()),
            "length_correlation": bias.correlation,
            "length_slope": bias.slope,
            "margin_order": float(log_margin_order(first, last)),
            "ches": now.ches,
        }
        # Not a number where there is nothing to measure: no tracker wants it.
        return {f"monitor/{name}": one for name, one in values.items() if one == one}
