# SPDX-License-Identifier: Apache-2.0
"""What a model does to its head's outputs before it returns them as logits, found from known
outputs and what became of them.

Whatever its configuration calls it, a scale s and a cap c make f(x) = c tanh(s x / c) of an output
x, or s x without a cap, and a vocabulary that was padded loses its last entries. Known outputs are
powers of two and their negatives, from 2^-12 to 2^24: f(x) / x is s where x is small, f is c where
x is large, and powers of two go through a cast to 16 bits unharmed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST, LARGEST = -30, 24  # exponents
HELD_OUT = 1.37  # no power of two: what the fit is verified on
UNLIKE = "its logits are not a scale and a cap of its head's outputs"
ROUNDING = 2e-6  # relative, of a few float32 operations


class LogitTransform(NamedTuple):
    """Of a head's output x: softcap tanh(scale x / softcap), or scale x, of the first ``size``
    entries."""

    scale: float
    softcap: float | None
    size: int  # entries of the vocabulary that remain

    def __call__(self, outputs: Tensor) -> Tensor:
        kept = outputs[..., : self.size] * self.scale
        return kept if self.softcap is None else self.softcap * torch.tanh(kept / self.softcap)


def known_outputs(rows: int, columns: int, device: torch.device) -> Tensor:
    """(2, rows, columns): what a head is made to return. In every column the rows are far apart,
    and in every row the columns have all sizes and both signs. The second half is held out."""
    # float64 goes through most models as it is, and the rest cast it themselves.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    span = LARGEST - SMALLEST + 1
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None] * (span // rows + 1)
    steps = torch.arange(columns, device=device, dtype=torch.int64) + row
    exponents = (SMALLEST + steps % span).to(dtype)
    signs = 1.0 - 2.0 * ((steps // 3) % 2).to(dtype)
    powers = torch.exp2(exponents) * signs
    return torch.stack([powers, powers * HELD_OUT])


def fit(outputs: Tensor, final: Tensor) -> LogitTransform | str:
    """The transform that makes ``final`` (2, rows, V') of ``outputs`` (2, rows, V) from
    ``known_outputs``, or why none of this form does."""
    size = final.shape[-1]
    if final.shape[:-1] != outputs.shape[:-1] or size > outputs.shape[-1]:
        return f"it makes {tuple(final.shape)} of head outputs {tuple(outputs.shape)}"
    precision = torch.finfo(final.dtype).eps
    outputs, final = outputs.cpu(), final.cpu()  # not every device has float64
    x, y = outputs[0, :, :size].double().flatten(), final[0].double().flatten()
    small, large = x.abs() <= 2.0 ** (SMALLEST + 2), x.abs() >= 2.0 ** (LARGEST - 2)
    if not (bool(small.any()) and bool(large.any())):
        return f"a vocabulary of {size} is too small to measure"
    rates = y[small] / x[small]
    scale = float(rates.median())
    top = float(y[large].abs().median())
    linear = abs(float((y[large] / x[large]).median()) - scale) <= 1e-3 * abs(scale)
    softcap = None if linear else top
    found = LogitTransform(scale, softcap, size)
    if not (0 < scale < math.inf and 0 < top < math.inf):
        return f"{UNLIKE} ({scale:g} times small ones, {top:g} for large ones)"
    # A power of two is exact in any dtype, another scale is not.
    if precision > torch.finfo(torch.float32).eps and math.frexp(scale)[0] != 0.5:
        return f"it scales logits by {scale:g} in {final.dtype}, too coarse to measure"
    expected = found(outputs.double())
    error = (final.double() - expected).abs() / expected.abs()
    worst = float(error.max())
    if not worst <= max(4 * precision, ROUNDING):
        return f"{UNLIKE} ({worst:.1e} away from {scale:g} and {softcap})"
    return found
