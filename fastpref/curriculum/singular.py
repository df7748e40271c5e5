# SPDX-License-Identifier: Apache-2.0
"""The classifier that a very wide and deep network becomes, as a score of separability."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.reading import readable
from .checks import integers, number, numbers, same_shape

SMALLEST = 1e-150  # of distances, so that no power of one overflows its logarithm


def singular_kernel_scores(
    features: Tensor, labels: Tensor, *, power: float | None = None
) -> Tensor:
    """What all other rows say about each row's label, the nearest far louder.

        score_i = sum_{j != i} y_j |u_i - u_j|^-power / sum_{j != i} |u_i - u_j|^-power

    with u the features on the unit sphere: kernel smoothing with a kernel that is singular at 0,
    which "Wide and deep neural networks achieve optimality for classification" (Radhakrishnan,
    Belkin and Uhler 2023, arXiv:2204.14126) find infinitely wide and deep networks to become, for
    some activations, and consistent where the power is the dimension of the sphere. The networks'
    own kernel is not here, only its singularity; each row is left out of its own score.

    ``(scores * labels > 0)`` is about one half of rows that nothing tells apart; rows of a negative
    product lie among those of the other label.

    Args:
        features: (N, H), nonzero rows.
        labels: (N,) integer, 1 and -1: chosen and rejected, or two sources.
        power: > 0; None: H - 1. Small ones tend to the majority, large ones to the nearest row.

    Returns:
        (N,) in [-1, 1]. Arithmetic is float64, in logarithms. O(N^2 H).
    """
    rows = numbers("features", features, "(N, H)")
    signs = integers("labels", labels, "(N,)")
    same_shape("labels", signs, "the rows of features", rows.shape[:1])
    if len(rows) < 2 or rows.shape[1] < 2:
        raise ValueError(f"features must be at least 2 rows of 2, got {tuple(rows.shape)}")
    if readable(signs) and bool((signs.abs() != 1).any()):
        raise ValueError(f"labels must be 1 or -1, got {signs.unique().tolist()}")
    exponent = (
        float(rows.shape[1] - 1) if power is None else number("power", power, 0.0, open_low=True)
    )
    wide = rows.double()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    if readable(length) and bool((length == 0).any()):
        raise ValueError(
            f"features must be nonzero, got row {int((length == 0).nonzero()[0, 0])} of 0"
        )
    unit = wide / length
    # Differences, not products, which lose small distances.
    distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    louder = -exponent * distance.clamp(min=SMALLEST).log()
    louder.fill_diagonal_(-torch.inf)
    return (louder.softmax(-1) @ signs.double()).to(rows.dtype)
