# SPDX-License-Identifier: Apache-2.0
"""Diagnostics of a model by their definitions, in numpy and from whole hidden states."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor


def spearman(a: list[float], b: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < one for other in values) + (values.count(one) - 1) / 2 for one in values
        ]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def centred_similarity(model: Any, batch: dict[str, Tensor]) -> list[float]:
    """Normalised CHES of the pairs of a batch, chosen rows first: of the mean states that predict
    its tokens, those of the chosen one times those of the rejected one, less their own square."""
    own = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        states = own.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    rows = zip(states[:, :-1], batch["labels"][:, 1:] != -100, strict=True)
    means = [one[mask].numpy().mean(0) for one, mask in rows]
    pairs = len(means) // 2
    return [float(a @ b - a @ a) for a, b in zip(means[:pairs], means[pairs:], strict=True)]
