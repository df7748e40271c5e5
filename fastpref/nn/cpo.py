# SPDX-License-Identifier: Apache-2.0
"""Contrastive preference optimization as a module."""

from __future__ import annotations

from typing import Any

from .paired import PairedLoss


class FusedLinearCPOLoss(PairedLoss):
    """Takes what Liger-Kernel 0.8.5's LigerFusedLinearCPOLoss takes.

    Args:
        ignore_index: target of a position that is not scored.
        beta, label_smoothing: of the objective.
        alpha: weight of the mean negative log-likelihood of the chosen responses' tokens,
        compute_nll_loss: which this adds.
        average_log_prob: compare means over tokens instead of sums.
        compiled, chunk_size: without effect.

    Raises:
        ValueError, TypeError: naming the setting, what came, and what was expected.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index, alpha, compute_nll_loss, average_log_prob, compiled, chunk_size
        )
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.check_configuration()

    def configuration(self) -> tuple[str, dict[str, Any]]:
        # Its own likelihood term is a mean over responses, not over all their tokens.
        smoothing = self.label_smoothing
        return "cpo", {"beta": self.beta, "label_smoothing": smoothing, "sft_weight": 0.0}
