# SPDX-License-Identifier: Apache-2.0
"""The angle between the logits of two models as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..scoring import linear_divergence
from .distillation import DistillationLoss


class FusedLinearCosineSimilarityLoss(DistillationLoss):
    """Takes what Liger-Kernel 0.8.5's LigerFusedLinearCosineSimilarityLoss takes.

        loss = weight_soft_loss beta (1 - cos) + weight_hard_loss CE, means over scored tokens

    Args:
        weight_hard_loss, weight_soft_loss: of the cross-entropy of the labels and of the angle.
        beta: a factor of the angle.
        ignore_index: label of a token that is not scored.
        temperature: > 0; an angle does not depend on it.
        compiled, chunk_size: without effect.
        return_soft_hard_loss: return (loss, beta (1 - cos), cross-entropy).

    Raises:
        ValueError: naming the setting, what came, and what was expected.
    """

    def divergence(self, *models: Tensor, **biases: Any) -> Tensor:
        return self.beta * linear_divergence(*models, divergence="cosine", **biases)
