# SPDX-License-Identifier: Apache-2.0
"""Kernel ridge regression in closed form: how hard a probe on frozen features finds each row."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import number, numbers, tensor


def ridge_difficulty(features: Tensor, targets: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """How far a linear head on frozen features misses each row that it has not seen.

        difficulty_i = |y_i - f_i(x_i)|,  f_i the kernel ridge regression on all rows but i

    for all i from one factorisation, as r_i / (1 - S_ii) of its residuals r and smoother S. Of
    self-supervised dataset distillation (Lee et al. 2024, arXiv:2310.06511) this is the closed-form
    head on fixed representations, and nothing of the distillation. As a probe: features are pooled
    hidden states, targets rewards, margins or labels; rows that are hard to predict from what the
    model knows come late in ``StageSampler``, or weigh otherwise.

    Args:
        features: (N, H); centred here, so that the head has an intercept.
        targets: (N,), or (N, C) of several at once.
        ridge: > 0, the penalty relative to the mean squared length of centred features.

    Returns:
        (N,): the Euclidean norm over C. Arithmetic is float64; O(N^2 H + N^3), or
        O(N H^2 + H^3) where H < N.
    """
    rows = numbers("features", features, "(N, H)")
    if len(rows) < 2:
        raise ValueError(f"features must be at least 2 rows, got {len(rows)}")
    tensor(
        "targets",
        targets,
        "(N,)" if isinstance(targets, Tensor) and targets.dim() == 1 else "(N, C)",
    )
    values = numbers("targets", targets, "(N,)" if targets.dim() == 1 else "(N, C)")
    if len(values) != len(rows):
        raise ValueError(f"targets must be of N = {len(rows)} rows, got {len(values)}")
    ridge = number("ridge", ridge, 0.0, open_low=True)
    wanted = values.double().reshape(len(values), -1)
    wide = rows.double() - rows.double().mean(0)
    smoother = linear_smoother(wide, wide, ridge)
    wanted = wanted - wanted.mean(0)
    # The intercept takes 1/N of each row's own target.
    own = smoother.diagonal() + 1 / len(rows)
    missed = (wanted - smoother @ wanted) / (1 - own)[:, None]
    far: Tensor = torch.linalg.vector_norm(missed, dim=1)
    return far.to(torch.promote_types(rows.dtype, values.dtype))


def linear_smoother(train: Tensor, test: Tensor, ridge: float) -> Tensor:
    """(tests, trains), what makes predictions of centred targets: test (X^T X + s I)^-1 X^T with s
    ``ridge`` times the mean squared length of the rows; all float64, centred by one mean."""
    strength = ridge * train.square().sum(1).mean()
    # Where all rows are equal, any penalty makes predictions of 0.
    strength = torch.where(strength > 0, strength, 1)
    if train.shape[1] < train.shape[0]:
        return test @ _solve(train.T @ train, strength, train.T)
    return _solve(train @ train.T, strength, train @ test.T).T


def _solve(gram: Tensor, strength: Tensor, right: Tensor) -> Tensor:
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + strength * identity))
