# SPDX-License-Identifier: Apache-2.0
"""Optimizers of an LM head whose weight's gradient is never formed::

    head = model.lm_head.weight.requires_grad_(False)
    optimizer = DCTAdamW(head, rank=128, lr=1e-4)
    output = fastpref.preference_loss(..., weight_grad_basis=optimizer.basis)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()

After "SVD-free low-rank adaptive gradient optimization" (arXiv:2505.17967): the gradient's
projection on some columns of the discrete cosine transform. Only a fused head can add it up without
the gradient itself; other parameters go to an optimizer of their own.
"""

from ..scoring.basis import WeightGradBasis
from .adamw import DCTAdamW
from .dct import dct_matrix

__all__ = ["DCTAdamW", "WeightGradBasis", "dct_matrix"]
