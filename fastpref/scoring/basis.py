# SPDX-License-Identifier: Apache-2.0
"""A few columns that the gradient of a head's weight is projected on, in place of the gradient.

With K the kept matrices of a rule, c their factors and Q (H, r) the columns,

    (K^T (c hidden)) Q = K^T (c hidden Q):

hidden states are projected first, the product over the vocabulary has r inner columns, and nothing
of the weight's size is formed. The columns themselves are chosen by what the whole gradient is on
those of a transform C (H, m), of which sums of squares are enough: a slab of the vocabulary at a
time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class WeightGradBasis(NamedTuple):
    """``weight_grad_basis`` of ``linear_logprob`` and ``preference_loss``; the first two as a plain
    pair too. All are tensors on the weight's device.

    - ``columns``: (H, r), orthonormal; read in backward.
    - ``out``: (V, r) float32; backward adds (dense gradient) @ columns.
    - ``transform``: (H, m), read in backward, or None.
    - ``norms``: (m,) float32, or None; backward adds the squared norms of the columns of (dense
      gradient) @ transform.
    """

    columns: Tensor
    out: Tensor
    transform: Tensor | None = None
    norms: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """The same, checked."""

    given: WeightGradBasis

    @property
    def rank(self) -> int:
        return self.given.columns.shape[1]

    @property
    def measured(self) -> int:
        """Columns of which sums of squares are wanted."""
        return 0 if self.given.transform is None else self.given.transform.shape[1]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(H, rank + measured), what rows are multiplied by."""
        columns = self.given.columns.detach().to(dtype)
        transform = self.given.transform
        if transform is None:
            return columns
        return torch.cat([columns, transform.detach().to(dtype)], dim=1)

    def add(self, gradient: Tensor | None, factor: Tensor | None = None) -> None:
        """Onto ``out``, a gradient (rows in use, rank), times ``factor``, 0-dim."""
        if gradient is not None:
            out = self.given.out[: gradient.shape[0]]
            out.add_(gradient) if factor is None else out.addcmul_(gradient, factor)

    def add_norms(self, squares: Tensor | None) -> None:
        if squares is not None and self.given.norms is not None:
            self.given.norms.add_(squares)
