# SPDX-License-Identifier: Apache-2.0
"""Policy and reference side by side, over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..scoring import autograd, linear_divergence, operators
from ..scoring.api import Asked
from ..scoring.request import make_request, plan_target
from ..scoring.rules.mixture import Mixture
from ..scoring.vocab_parallel import vocabulary_size


@dataclass(frozen=True)
class Comparison:
    policy: Asked
    reference: Asked
    target: Tensor  # (B, T) or (N,)

    @property
    def ref_vocabulary_size(self) -> int:
        """Of all ranks together."""
        hidden, head = self.reference.model
        return vocabulary_size(head.form.group, head.weight.shape[0], hidden.device)

    def kl(self) -> Tensor:
        """KL(reference, policy) of each token, like ``target``; differentiable."""
        self._check_whole()
        (hidden, head), (ref_hidden, ref_head) = self.policy.model, self.reference.model
        map, request = head.form.map, self.policy.request
        return linear_divergence(
            hidden,
            head.weight,
            ref_hidden,
            ref_head.weight,
            self.target != request.ignore_index,
            student_bias=head.bias,
            teacher_bias=ref_head.bias,
            student_lora=head.lora,
            teacher_lora=ref_head.lora,
            logit_scale=map.scale,
            softcap=map.cap or None,
            options=request.options,
        )

    def mixed_logp(self, epsilon: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets, like these, under the policy's logits moved away from
        the reference's by a share of ``epsilon``, and towards them."""
        self._check_whole()
        rule, models = Mixture(epsilon), [self.policy.model.detached(), self.reference.model]
        with torch.no_grad():
            asked = self.policy.request
            request = make_request(models, ignore_index=asked.ignore_index, options=asked.options)
            if torch.compiler.is_compiling():
                plus, minus = operators.MIXTURE.run(request, rule, models, self.target)
            else:
                plus, minus = autograd.run(plan_target(request, rule, models, self.target), models)
        if plus is None or minus is None:
            raise RuntimeError("both are always found")
        return plus, minus

    def _check_whole(self) -> None:
        if self.policy.model.head.form.group is not None:
            raise ValueError(
                "tp_group must be None where whole distributions are compared; gather the head, or "
                "pass the extra that is made of them"
            )
