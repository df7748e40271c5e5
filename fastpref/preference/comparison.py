# SPDX-License-Identifier: Apache-2.0
"""Policy and reference side by side, over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..scoring import linear_divergence, two_head_operators
from ..scoring.mixture import mixed_logprob
from ..scoring.request import Lora, Parameters, Request
from ..scoring.two_heads import ask_two_heads
from ..scoring.vocab_parallel import vocabulary_size


class Projection(NamedTuple):
    """A model's hidden states and head."""

    request: Request
    hidden: Tensor
    parameters: Parameters

    @property
    def lora(self) -> Lora | None:
        _, _, a, b = self.parameters
        return None if a is None or b is None else (a, b, self.request.lora_scale)

    @property
    def vocabulary_size(self) -> int:
        """Of all ranks together."""
        columns = self.parameters.weight.shape[0]
        return vocabulary_size(self.request.group, columns, self.hidden.device)


@dataclass(frozen=True)
class Comparison:
    policy: Projection
    reference: Projection
    target: Tensor  # (B, T) or (N,)
    ignore_index: int

    def kl(self) -> Tensor:
        """KL(reference, policy) of each token, like ``target``; differentiable."""
        self._check_whole()
        policy, reference = self.policy, self.reference
        map = policy.request.map
        return linear_divergence(
            policy.hidden,
            policy.parameters.weight,
            reference.hidden,
            reference.parameters.weight,
            self.target != self.ignore_index,
            student_bias=policy.parameters.bias,
            teacher_bias=reference.parameters.bias,
            student_lora=policy.lora,
            teacher_lora=reference.lora,
            logit_scale=map.scale,
            softcap=map.cap or None,
            options=policy.request.options,
        )

    def mixed_logp(self, epsilon: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets, like these, under the policy's logits moved away from
        the reference's by a share of ``epsilon``, and towards them."""
        self._check_whole()
        policy, reference = self.policy, self.reference
        map = policy.request.map
        with torch.no_grad():
            question, ours, theirs = ask_two_heads(
                (policy.hidden, *policy.parameters[:2], policy.lora),
                (reference.hidden, *reference.parameters[:2], reference.lora),
                self.target != self.ignore_index,
                temperature=1.0,
                logit_scale=map.scale,
                softcap=map.cap or None,
                options=policy.request.options,
            )
            if torch.compiler.is_compiling():
                return two_head_operators.mixed(question, ours, theirs, self.target, epsilon)
            heads = question.heads(ours, theirs)
            return mixed_logprob(heads, ours, theirs, self.target, epsilon)

    def _check_whole(self) -> None:
        if self.policy.request.group is not None:
            raise ValueError(
                "tp_group must be None where whole distributions are compared; gather the head, or "
                "pass the extra that is made of them"
            )
