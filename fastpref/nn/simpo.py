# SPDX-License-Identifier: Apache-2.0
"""Simple preference optimization as a module."""

from __future__ import annotations

from typing import Any

from .paired import PairedLoss


class FusedLinearSimPOLoss(PairedLoss):
    """Takes what Liger-Kernel 0.8.5's LigerFusedLinearSimPOLoss takes.

    The log-probabilities that it compares and returns are means over tokens.

    Args:
        ignore_index: target of a position that is not scored.
        beta, label_smoothing: of the objective.
        alpha: weight of the mean negative log-likelihood of the chosen responses' tokens,
        compute_nll_loss: which this adds.
        gamma: the target margin itself, not its ratio to beta.
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
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, alpha, compute_nll_loss, True, compiled, chunk_size)
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.gamma = gamma
        self.check_configuration()

    def configuration(self) -> tuple[str, dict[str, Any]]:
        smoothing = self.label_smoothing
        return "simpo", {"beta": self.beta, "gamma": self.gamma, "label_smoothing": smoothing}
