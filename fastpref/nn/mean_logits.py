# SPDX-License-Identifier: Apache-2.0
"""The mean logits that Liger-Kernel's losses return: over all positions, scored or not.

Logits are linear in the hidden states, so that the sum of the hidden rows times the mean row of the
head has their mean, without the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 22  # elements of a head that are widened at a time


def sums_of_mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of each row the sum, over its positions, of a position's mean logit.

    Args:
        hidden: (B, T, H). What is NaN in a row reaches the number of that row.
        weight: (V, H), with bias (V,): the head.

    Returns:
        (B,) float32, float64 where hidden or weight is; without gradient.
    """
    exact = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.no_grad():
        # Not a product of torch: autocast would round it.
        sums = (hidden.sum(1, dtype=exact) * _mean_row(weight, exact)).sum(-1)
        if bias is not None:
            sums = sums + hidden.shape[1] * bias.to(exact).mean()
    return sums


def _mean_row(weight: Tensor, exact: torch.dtype) -> Tensor:
    """(H,); on CPU torch would widen the whole head to sum it."""
    vocab, width = weight.shape
    widens = weight.device.type == "cpu" and weight.dtype != exact
    if not widens or torch.compiler.is_compiling():
        return weight.sum(0, dtype=exact) / vocab
    parts = [part.sum(0, dtype=exact) for part in weight.split(max(1, BLOCK // max(1, width)))]
    return torch.stack(parts).sum(0) / vocab
