# SPDX-License-Identifier: Apache-2.0
"""What a fused call returns. This module needs transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """Per-token scores in place of logits, with TRL's keys and meanings.

    Fields by token are (B, T - 1), ``[:, t]`` about the label at t + 1, and 0 (False) where that is
    -100; (B, T) with ``shift_labels``. Those not asked for are None. float32, for a float64 model
    float64.

    - ``loss``: mean negative log-likelihood of the scored tokens, or their sum over
      ``num_items_in_batch``, and on top what the model's own forward adds to its loss, such as a
      router's. Without a scored token the mean is NaN and the sum 0, as transformers' own.
    - ``log_probs``: of each label. Differentiable.
    - ``entropy``: of the distribution, in nats. Differentiable.
    - ``log_sum_sq_probs``: log of the sum of squared probabilities.
    - ``mean_logits``: mean over the vocabulary, after scale, cap and temperature. Differentiable.
    - ``is_top1``: bool, whether the label is the likeliest token.
    - ``label_mask``: bool, whether there is a label.
    - ``aux_loss``: of a mixture of experts, when the model computes it; not yet times its weight.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
