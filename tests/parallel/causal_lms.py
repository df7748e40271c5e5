# SPDX-License-Identifier: Apache-2.0
"""A batch for models of transformers of which the first half has no scored token, and the gradients
of one process with all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.integrations.causal_lm.models import batch, make

ROWS = 4


def whole_batch() -> dict[str, Tensor]:
    torch.manual_seed(7)
    given = batch(ROWS)
    given["labels"][:2] = -100
    return given


def own_part(rank: int) -> dict[str, Tensor]:
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    return {name: value[half] for name, value in whole_batch().items()}


def count() -> Tensor:
    return (whole_batch()["labels"][:, 1:] != -100).sum()


def expected(architecture: str, **fields: Any) -> dict[str, Tensor]:
    """From full logits."""
    model, given = make(architecture, **fields), whole_batch()
    logps, target = model(**given).logits[:, :-1].log_softmax(-1), given["labels"][:, 1:]
    own = logps.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    (-own[target != -100].sum() / count()).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {
        name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in found.items()
    }
