# SPDX-License-Identifier: Apache-2.0
"""What the losses between two models share: a divergence of their distributions, and the
cross-entropy of the labels beside it."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..scoring import linear_logprob
from .checks import check_tokens

# The loss, or with return_soft_hard_loss (loss, divergence, cross-entropy).
Distilled: TypeAlias = Tensor | tuple[Tensor, Tensor, Tensor]


class DistillationLoss(torch.nn.Module):
    """Base of the losses between student and teacher, means over the tokens that are scored."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss
        self.check_configuration()

    def check_configuration(self) -> None:
        """Raise ValueError where a setting is none."""
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature!r}; logits are divided by it"
            )

    def divergence(self, *models: Tensor, **biases: Any) -> Tensor:
        """(...), 0 where the mask is False, of what ``linear_divergence`` takes."""
        raise NotImplementedError

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Distilled:
        """The loss of a batch of tokens.

        Args:
            student_input: (..., H).
            student_weight: (V, H), with student_bias (V,): the head.
            teacher_input: (..., H'), scored without gradient through
            teacher_weight, teacher_bias: (V', H') and (V',). Where V' and V differ, by padding,
                the divergence is over the ids that both have; no logits of 0 stand in for others.
            true_labels: (...) int64, already shifted; what is ``ignore_index`` counts nowhere.

        Returns:
            loss (0-dim), or with ``return_soft_hard_loss`` (loss, divergence, cross-entropy), all
            differentiable.

        Raises:
            ValueError, TypeError: naming the argument, what came, what was expected, the remedy.
        """
        check_tokens("student", student_input, student_weight, true_labels)
        check_tokens("teacher", teacher_input, teacher_weight, true_labels)
        mask = true_labels != self.ignore_index
        tokens = mask.sum().clamp(min=1)
        divergence = self.divergence(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            mask,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
        )
        soft = divergence.sum() / tokens
        loss, hard = self.weight_soft_loss * soft, soft.new_zeros(())
        if self.weight_hard_loss or self.return_soft_hard_loss:
            scores = linear_logprob(
                student_input,
                student_weight,
                true_labels,
                bias=student_bias,
                ignore_index=self.ignore_index,
            )
            hard = -cast(Tensor, scores.logp).sum() / tokens
            loss = loss + self.weight_hard_loss * hard
        return (loss, soft, hard) if self.return_soft_hard_loss else loss
