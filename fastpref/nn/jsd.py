# SPDX-License-Identifier: Apache-2.0
"""The generalized Jensen-Shannon divergence of two models as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..scoring import linear_divergence
from .distillation import DistillationLoss


class FusedLinearJSDLoss(DistillationLoss):
    """Takes what Liger-Kernel 0.8.5's LigerFusedLinearJSDLoss takes.

        loss = weight_soft_loss JSD + weight_hard_loss CE, means over scored tokens
        JSD = beta KL(teacher, m) + (1 - beta) KL(student, m), m = beta teacher + (1 - beta) student

    Agarwal et al. 2023 (GKD), arXiv:2306.13649; beta 0 is KL(teacher, student), beta 1
    KL(student, teacher).

    Args:
        weight_hard_loss, weight_soft_loss: of the cross-entropy of the labels and the divergence.
        beta: in [0, 1].
        ignore_index: label of a token that is not scored.
        temperature: > 0, of both distributions in the divergence.
        compiled, chunk_size: without effect.
        return_soft_hard_loss: return (loss, divergence, cross-entropy).

    Raises:
        ValueError: naming the setting, what came, and what was expected.
    """

    def check_configuration(self) -> None:
        super().check_configuration()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], the share of the teacher, got {self.beta!r}")

    def divergence(self, *models: Tensor, **biases: Any) -> Tensor:
        beta, temperature = self.beta, self.temperature
        return linear_divergence(
            *models, divergence="jsd", beta=beta, temperature=temperature, **biases
        )
