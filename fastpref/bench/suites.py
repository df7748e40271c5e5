# SPDX-License-Identifier: Apache-2.0
"""What can be measured, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from .denoising import denoising_experiment
from .divergences import divergence_experiment
from .experiment import MODES, Case, Experiment, Mode, missing
from .head import call_experiment, head_experiment, low_rank_experiment
from .heads import heads_experiment
from .losses import KINDS, loss_experiment, score_experiment
from .training import training_experiment


class Suite(NamedTuple):
    title: str
    experiment: Callable[[Case], Experiment]
    modes: tuple[Mode, ...] = tuple(MODES)
    needs: str | None = None  # a module
    computes_in: str | None = None  # a dtype, whatever that of the products

    @property
    def unavailable(self) -> str | None:
        return self.needs and missing(self.needs)


SUITES = {
    "score": Suite("linear_logprob and DPO on given references", score_experiment),
    **{
        name: Suite(
            f"preference_loss, {name}" + (", live reference" if kind.reference else ""),
            functools.partial(loss_experiment, kind),
        )
        for name, kind in KINDS.items()
    },
    "divergence": Suite("linear_divergence, forward KL", divergence_experiment),
    "head": Suite("the head alone, packed rows", head_experiment),
    "low-rank": Suite(
        "the head's gradient, dense and projected on columns of the DCT",
        low_rank_experiment,
        ("trainable head",),
    ),
    "call": Suite(
        "TRL's call: log-probabilities, entropy, mean logits, top token", call_experiment
    ),
    "heads": Suite(
        "objectives alone, beside the products of a step",
        heads_experiment,
        ("forward", "trainable head"),
        computes_in="float32",
    ),
    "denoising": Suite(
        "Diffusion-DPO's loss alone, beside the products of one head on as many rows",
        denoising_experiment,
        ("forward", "frozen head"),
    ),
    "step": Suite(
        "a training step with a two-layer model", training_experiment, needs="transformers"
    ),
}
