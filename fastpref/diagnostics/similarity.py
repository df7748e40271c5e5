# SPDX-License-Identifier: Apache-2.0
"""CHES: which pairs will push their chosen response down (Razin et al., "Unintentional
unalignment", arXiv:2410.08847)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.checks import flag
from .checks import check_finite, check_floats, check_mask


def ches(
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    normalize: bool = True,
) -> Tensor:
    """The centred hidden embedding similarity of each pair, (P,) float32 (float64 of float64):
    <c, r> - |c|^2 with c and r the sums of a response's hidden states; with ``normalize``
    <c, r> / (n_c n_r) - |c|^2 / n_c^2, n being their numbers. The larger, the more likely is the
    chosen response to be displaced; the paper filters out the top 5%, as
    ``fastpref.curriculum.top_fraction`` does.

    Args:
        chosen_hidden, rejected_hidden: (P, T, H), of the last layer, before the head, under the
            model that a training starts from; lengths may differ.
        chosen_mask, rejected_mask: (P, T) bool, the states that count: those that predict the
            tokens of the response, which leaves out the state of its last token, as the paper does.
            What is not counted is not read.
    """
    for name, hidden in (("chosen_hidden", chosen_hidden), ("rejected_hidden", rejected_hidden)):
        check_floats(3, "(P, T, H)", finite=False, **{name: hidden})
    sizes = [(one.shape[0], one.shape[2]) for one in (chosen_hidden, rejected_hidden)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "rejected_hidden must hold as many pairs of the same width as chosen_hidden, (P, H) = "
            f"{sizes[0]}, got {sizes[1]}"
        )
    check_mask("chosen_mask", chosen_mask, chosen_hidden.shape[:2])
    check_mask("rejected_mask", rejected_mask, rejected_hidden.shape[:2])
    normalize = flag("normalize", normalize)
    chosen, chosen_count = _sums(chosen_hidden, chosen_mask)
    rejected, rejected_count = _sums(rejected_hidden, rejected_mask)
    check_finite("the sum of chosen_hidden", chosen)
    check_finite("the sum of rejected_hidden", rejected)
    if normalize:
        chosen, rejected = chosen / chosen_count, rejected / rejected_count
    return (chosen * rejected).sum(1) - chosen.square().sum(1)


def _sums(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(P, H), and (P, 1) how many there are, at least 1; a pair at a time, whatever the dtype."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    rows = [
        torch.where(own[:, None], states.detach(), 0).sum(0, dtype=exact)
        for states, own in zip(hidden, mask, strict=True)
    ]
    return torch.stack(rows), mask.sum(1, keepdim=True).clamp(min=1).to(exact)
