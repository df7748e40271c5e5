# SPDX-License-Identifier: Apache-2.0
"""Whether a policy prefers responses for their length (the bias that R-DPO, arXiv:2403.19159, and
LD-DPO, arXiv:2409.06411, set out to remove)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import no_tensor
from ..objectives.reading import readable
from .checks import check_floats, wide


@dataclass(frozen=True)
class LengthBias:
    """What the margins have to do with lengths; NaN where there is nothing to measure it on.

    - ``correlation``: of margins with chosen minus rejected tokens.
    - ``slope``: margin a token more, by least squares.
    - ``chosen_longer``: share of pairs whose chosen response is longer.
    - ``accuracy_longer``: share of positive margins among those.
    - ``accuracy_shorter``: the same among pairs whose chosen response is shorter.
    """

    correlation: float
    slope: float
    chosen_longer: float
    accuracy_longer: float
    accuracy_shorter: float


def length_bias(margins: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> LengthBias:
    """A report in plain statistics, no test of the papers.

    Args:
        margins: (P,) rewards of chosen minus rejected responses, such as beta times the difference
            of log-ratios.
        chosen_lengths, rejected_lengths: (P,) tokens, of any integer or floating-point dtype.
    """
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    for name, one in lengths.items():
        if not isinstance(one, Tensor):
            raise no_tensor(name, one)
        if one.dtype == torch.bool or one.is_complex():
            raise TypeError(f"{name} must be integer or floating point, got {one.dtype}")
    numbers: dict[str, Any] = {name: one.to(torch.float64) for name, one in lengths.items()}
    check_floats(1, "(P,)", margins=margins, **numbers)
    for name, one in numbers.items():
        if readable(one) and bool((one < 0).any()):
            raise ValueError(f"{name} must be numbers of tokens, >= 0, got {float(one.min()):g}")
    margin, more = wide(margins), numbers["chosen_lengths"] - numbers["rejected_lengths"]
    margin_off, more_off = margin - margin.mean(), more - more.mean()
    together, spread = (margin_off * more_off).sum(), more_off.square().sum()
    right = wide(margin > 0)
    return LengthBias(
        correlation=float(together / (spread * margin_off.square().sum()).sqrt()),
        slope=float(together / spread),
        chosen_longer=float(wide(more > 0).mean()),
        accuracy_longer=float(right[more > 0].mean()),
        accuracy_shorter=float(right[more < 0].mean()),
    )
