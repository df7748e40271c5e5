# SPDX-License-Identifier: Apache-2.0
"""Running averages that an objective takes, over optimizer steps, in checkpoints.

A step uses what the steps before it left. So all its micro-batches and ranks see the same, and it
does not matter how many there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...objectives import Objective, RunningMoments
from .labels import PreferenceLabels

logger = logging.getLogger("fastpref")


class _Statistic(NamedTuple):
    """What is averaged."""

    parts: tuple[str, ...]  # each by itself; the mean of their means is taken
    # Of log-ratios (U, r), labels and beta, the values of each part.
    values: Callable[[Tensor, PreferenceLabels, float], tuple[Tensor, ...]]


def _rewards(log_ratios: Tensor, labels: PreferenceLabels, beta: float) -> tuple[Tensor, ...]:
    rewards = beta * log_ratios
    if "labels" not in labels:
        return rewards[:, 0], rewards[:, 1]
    desirable = labels.numbers("labels") != 0
    return rewards[desirable], rewards[~desirable]


def _gaps(log_ratios: Tensor, labels: PreferenceLabels, beta: float) -> tuple[Tensor, ...]:
    return (log_ratios[:, 0] - log_ratios[:, 1],)


def _gaps_per_token(
    log_ratios: Tensor, labels: PreferenceLabels, beta: float
) -> tuple[Tensor, ...]:
    return _gaps(log_ratios / labels.lengths, labels, beta)


# Chosen and rejected responses, or those of either label, count for half each.
REWARDS = _Statistic(("chosen", "rejected"), _rewards)
STATISTICS: Mapping[str, _Statistic] = {
    "bco": REWARDS,
    "bco_pair": REWARDS,
    "beta_dpo": _Statistic(("gap",), _gaps),
    "alpha_dpo": _Statistic(("gap",), _gaps_per_token),
}


class RunningState:
    """The running averages of one objective; none where it takes none.

    Raises:
        ValueError: the objective takes some, and what they are of is not known here.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._names = [
            name
            for name, facts in objective.extras.items()
            if facts.shapes == ("number",) and name != "kl"  # kto takes the batch's own
        ]
        self._statistic = _statistic_of(objective, self._names)
        self._moments = {part: RunningMoments() for part in self._statistic.parts}
        self._collected: list[tuple[Tensor, ...]] = []
        self._is_kept = False

    @property
    def parts(self) -> set[str]:
        """The names in ``state_dict``."""
        return set(self._moments)

    def extras(self) -> dict[str, Tensor]:
        """0-dim, by the objective's names for them."""
        if not self._names:
            return {}
        moments = list(self._moments.values())
        mean = sum((one.mean for one in moments[1:]), moments[0].mean) / len(moments)
        made = {"delta": mean, "running_mean": mean, "running_std": moments[0].std}
        return {name: made[name] for name in self._names}

    def collect(self, log_ratios: Tensor, labels: PreferenceLabels) -> None:
        """Hold what a micro-batch adds until the step ends; ``log_ratios`` are (U, r)."""
        if not self._names:
            return
        if not self._is_kept:
            raise RuntimeError(
                f"{self._objective.name} takes {' and '.join(self._names)}, an average over the "
                "training, which nobody keeps: pass Trainer(..., callbacks=[loss.callback])"
            )
        beta = self._objective.hyperparameters["beta"]
        self._collected.append(self._statistic.values(log_ratios, labels, beta))

    def end_step(self) -> None:
        """Take in what the micro-batches collected, on all ranks."""
        if not self._collected:
            return
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        parts = zip(*self._collected, strict=True)
        for moments, values in zip(self._moments.values(), parts, strict=True):
            moments.update(torch.cat([one.flatten() for one in values]), group)
        self._collected = []

    def begin(self, stored: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; from nothing, where it is empty."""
        self._is_kept, self._collected = True, []
        for part in self._moments:
            self._moments[part] = RunningMoments()
            if part in stored:
                self._moments[part].load_state_dict(_as_tensors(**stored[part]))

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """For JSON, which holds Python's numbers to the bit."""
        return {part: _as_numbers(**one.state_dict()) for part, one in self._moments.items()}


def _as_numbers(mean: Tensor, std: Tensor, updates: int) -> dict[str, Any]:
    dtype = str(mean.dtype).removeprefix("torch.")
    return {"mean": mean.item(), "std": std.item(), "updates": updates, "dtype": dtype}


def _as_tensors(mean: float, std: float, updates: int, dtype: str) -> dict[str, Any]:
    made = torch.tensor([mean, std], dtype=getattr(torch, dtype), device="cpu")
    return {"mean": made[0], "std": made[1], "updates": updates}


def _statistic_of(objective: Objective, names: list[str]) -> _Statistic:
    if not names:
        return _Statistic((), lambda *_: ())
    if objective.registration is not None and objective.name in STATISTICS:
        return STATISTICS[objective.name]
    # Of objectives combined: the beta that they all have.
    if names == ["delta"] and "beta" in objective.hyperparameters:
        return REWARDS
    raise ValueError(
        f"{objective.name} takes {' and '.join(names)}, averaged over the training, and it is not "
        f"known of what. It is for {', '.join(STATISTICS)}, and for combinations with the first "
        "two of which all have one beta; take one of these, or keep a RunningMoments in a loop of "
        "your own"
    )


def state_callback(running: RunningState) -> Any:
    """A ``TrainerCallback`` that keeps ``running``, in the Trainer's own state."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    # Where the Trainer restores callbacks it makes new ones of their class, without arguments: a
    # class of its own knows what it keeps.
    class PreferenceLossState(TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"moments": running.state_dict()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            name, stored = type(self).__name__, {}
            if state.global_step > 0:  # resumed, with what lies in the checkpoint
                saved = state.stateful_callbacks.get(name, {})
                stored = saved.get("attributes", {}).get("moments", {})
                if not running.parts <= set(stored):
                    logger.warning(
                        "the checkpoint of step %d does not hold the running state of the "
                        "preference loss, which starts anew",
                        state.global_step,
                    )
            running.begin(stored)
            state.stateful_callbacks[name] = self.state()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            running.end_step()

    return PreferenceLossState()
