# SPDX-License-Identifier: Apache-2.0
"""One call of ``preference_loss``, checked, and what becomes of its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Objective
from ..scoring import ScoringOptions, TokenScores
from ..scoring.api import Asked, ask
from ..scoring.head import Lora
from ..scoring.validation import check_group
from . import arguments
from .comparison import Comparison
from .configuration import configure
from .evaluation import evaluate
from .filling import Batch, Material, filled_extras, policy_scores, reference_scores
from .layouts import Arrangement, LayoutName, arrange
from .output import PreferenceOutput, further_metrics, logp_of, scores_of


@dataclass(frozen=True)
class Task:
    objective: Objective
    batch: Batch
    arrangement: Arrangement
    policy: Asked
    reference: Asked | None  # to be scored here
    ref_logps: Tensor | None  # scored before, (B,) or one a token
    token_weights: Tensor | None
    extras: Mapping[str, Tensor]  # as given
    outputs: tuple[str, ...]
    reduction: Literal["mean", "sum", "none"]
    denominator: float | Tensor | None

    def output(
        self, policy: TokenScores, reference: TokenScores | None, loss: Tensor | None = None
    ) -> PreferenceOutput:
        """Of the scores of both; ``loss`` in place of the one computed from them."""
        batch, ref_logps = self.batch, self.ref_logps
        if ref_logps is not None and not arguments.is_sums(ref_logps, batch):
            reference, ref_logps = TokenScores(logp=ref_logps), None
        sums = batch.sums(logp_of(policy), self.token_weights)
        ref_sums = ref_logps
        if reference is not None:
            ref_sums = batch.sums(logp_of(reference), self.token_weights)
        comparison = None
        if self.reference is not None:
            comparison = Comparison(self.policy, self.reference, batch.target)
        material = Material(
            self.objective,
            batch,
            self.arrangement,
            self.token_weights,
            sums,
            policy,
            reference,
            comparison,
        )
        extras = filled_extras(self.objective, self.extras, material)
        evaluated = evaluate(self.objective, sums, ref_sums, material, extras)
        output = PreferenceOutput(
            self._reduced(evaluated.losses) if loss is None else loss,
            evaluated.losses.detach(),
            evaluated.rewards,
            sums,
            ref_sums,
            evaluated.metrics | further_metrics(self.outputs, material),
        )
        output.arrangement = self.arrangement
        return output

    def _reduced(self, losses: Tensor) -> Tensor:
        if self.reduction == "mean" and self.denominator is None:
            return losses.mean()
        loss = losses if self.reduction == "none" else losses.sum()
        return loss if self.denominator is None else loss / self.denominator


def make_task(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: str | Objective | Callable[..., Any],
    *,
    layout: LayoutName | Tensor,
    group_size: int | None,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    lora: Lora | None,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_lora: Lora | None,
    token_weights: Tensor | None,
    extras: Mapping[str, Tensor] | None,
    outputs: tuple[str, ...],
    reduction: Literal["mean", "sum", "none"],
    denominator: float | Tensor | None,
    tp_group: dist.ProcessGroup | None,
    seq_group: dist.ProcessGroup | None,
    dp_group: dist.ProcessGroup | None,
    options: ScoringOptions | None,
    hyperparameters: Mapping[str, Any],
) -> Task:
    """The arguments of ``preference_loss``, checked.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    arguments.check_tensors(
        weight=weight,
        target=target,
        cu_seqlens=cu_seqlens,
        ref_logps=ref_logps,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        token_weights=token_weights,
    )
    arguments.check_extras(extras)
    check_group(seq_group, "seq_group")
    check_group(dp_group, "dp_group")
    configured = configure(objective, dp_group, hyperparameters)
    arguments.check_reduction(reduction, denominator)
    arguments.check_outputs(outputs)
    arguments.check_rows(configured, target, cu_seqlens, seq_group, token_weights)
    batch = Batch(target, ignore_index, cu_seqlens, seq_group)
    arrangement = arrange(layout, group_size, batch.rows, configured)
    arguments.check_reference(
        configured,
        batch,
        weight,
        ref_logps,
        ref_hidden,
        ref_weight,
        ref_bias,
        ref_lora,
        token_weights,
    )
    given = dict(extras or {})
    head: dict[str, Any] = {
        "ignore_index": ignore_index,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "tp_group": tp_group,
        "options": options,
    }
    names = policy_scores(configured, given) | scores_of(outputs)
    policy = ask(
        hidden,
        weight,
        target,
        bias=bias,
        lora=lora,
        outputs=tuple(sorted(names)),
        differentiable=("logp",),
        **head,
    )
    reference = None
    if ref_hidden is not None:
        with torch.no_grad():
            reference = ask(
                ref_hidden,
                weight if ref_weight is None else ref_weight,
                target,
                bias=bias if ref_weight is None else ref_bias,
                lora=ref_lora,
                outputs=tuple(sorted(reference_scores(configured, given))),
                prefix="ref_",
                **head,
            )
    return Task(
        configured,
        batch,
        arrangement,
        policy,
        reference,
        None if ref_logps is None else ref_logps.detach(),
        token_weights,
        given,
        tuple(outputs),
        reduction,
        denominator,
    )
