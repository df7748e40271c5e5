# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization as a module."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .. import objectives
from ..objectives import UnitLosses
from ..scoring import linear_logprob
from ..sequences import sequence_logp
from .checks import check_head, check_reference, check_rows
from .mean_logits import sums_of_mean_logits


class FusedLinearKTOLoss(torch.nn.Module):
    """Takes what Liger-Kernel 0.8.5's LigerFusedLinearKTOLoss takes.

    Args:
        ignore_index: target of a position that is not scored.
        beta: of the objective.
        use_ref_model: whether ``forward`` takes a reference; False is a uniform one.
        average_log_prob: compare means over tokens instead of sums.
        compiled, chunk_size: without effect.

    Raises:
        ValueError, TypeError: naming the setting, what came, and what was expected.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        objectives.get("kto", beta=beta)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean loss of B responses.

        Args:
            _input: (B, T, H).
            lin_weight: (V, H), with bias (V,): the head.
            target: (B, T) int64, already shifted.
            preference_labels: (B,) bool, True where the response is desirable.
            ref_input: (B, T, H'), scored without gradient through
            ref_weight, ref_bias: its head; by default the policy's.
            kl: one number, the estimate of the policy's divergence from the reference; None is 0.

        Returns:
            loss (0-dim), (sum of the desirable and of the undesirable responses' log-probabilities,
            sums of their logits over the vocabulary and all positions, scored or not, sums of their
            rewards). The loss and the log-probabilities are differentiable.

        Raises:
            ValueError, TypeError: naming the argument, what came, what was expected, the remedy.
        """
        check_head(_input, lin_weight, target)
        if preference_labels is None:
            raise ValueError(
                "preference_labels must be provided for unpaired preference loss: (B,), True where "
                "the row is desirable, got None"
            )
        check_rows("preference_labels", preference_labels, (len(target),))
        logps = self._scored(_input, lin_weight, target, bias)
        ref_logps = torch.zeros_like(logps)
        if self.use_ref_model:
            check_reference(ref_input, ref_weight, target)
            head = (lin_weight, bias) if ref_weight is None else (ref_weight, ref_bias)
            with torch.no_grad():
                ref_logps = self._scored(cast(Tensor, ref_input), head[0], target, head[1])
        losses, rewards = self._compared(logps, ref_logps, preference_labels, kl)
        desirable = preference_labels != 0
        logits = sums_of_mean_logits(_input, lin_weight, bias) * lin_weight.shape[0]
        sums = [
            torch.where(rows, values, 0).sum()
            for values in (logps, logits, rewards)
            for rows in (desirable, ~desirable)
        ]
        return losses.mean(), tuple(sums)

    def _scored(
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None
    ) -> Tensor:
        """(B,), the log-probability of each row."""
        scores = linear_logprob(hidden, weight, target, bias=bias, ignore_index=self.ignore_index)
        return sequence_logp(
            cast(Tensor, scores.logp),
            mask=target != self.ignore_index,
            reduction="mean" if self.average_log_prob else "sum",
        )

    def _compared(
        self, logps: Tensor, ref_logps: Tensor, labels: Tensor, kl: Tensor | None
    ) -> UnitLosses:
        if kl is None:
            kl = logps.new_zeros(())
        elif not isinstance(kl, Tensor) or kl.numel() != 1:
            got = tuple(kl.shape) if isinstance(kl, Tensor) else type(kl).__name__
            raise ValueError(
                f"kl must be a tensor of one number, the batch's estimate, got {got}; take its mean"
            )
        return objectives.kto(logps, ref_logps, labels=labels, kl=kl.reshape(()), beta=self.beta)
