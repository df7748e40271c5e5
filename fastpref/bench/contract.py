# SPDX-License-Identifier: Apache-2.0
"""The error contract: at most twice that of plain torch at the input dtype, and 2 ulp."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Named = dict[str, Tensor]


class Worst(NamedTuple):
    share: float  # of the error that is allowed: at most 1 keeps the contract
    name: str
    error: float  # relative to the largest number of its kind


def worst(found: Named, eager: Named, exact: Named) -> Worst:
    """Of the largest and the root-mean-square error of each tensor. ``exact`` is float64; what is
    not finite, where ``exact`` is, counts as infinitely wrong."""
    shares = [_share(name, value, eager[name], exact[name]) for name, value in found.items()]
    return max(shares, key=lambda one: one.share)


def _share(name: str, value: Tensor, eager: Tensor, exact: Tensor) -> Worst:
    error, plain = (value.double() - exact).abs(), (eager.double() - exact).abs()
    largest = Worst(0.0, name, 0.0)
    for norm in (_max, _rms):
        size = norm(exact.abs())
        allowed = 2 * norm(plain) + 2 * ulp(size, value.dtype)
        share = norm(error) / allowed
        share = share if math.isfinite(share) else math.inf
        if share >= largest.share:
            largest = Worst(share, name, norm(error) / max(_max(exact.abs()), 1e-30))
    return largest


def _max(value: Tensor) -> float:
    return float(value.max())


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def ulp(value: float, dtype: torch.dtype) -> float:
    """Spacing of ``dtype`` at ``value``."""
    info = torch.finfo(dtype)
    return float(max(info.eps * 2.0 ** (math.frexp(value)[1] - 1), info.smallest_normal * info.eps))
