# SPDX-License-Identifier: Apache-2.0
"""Inputs for the tests of chosen ids, and logits in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

H, V, K = 7, 53, 6
MAP = {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.3}


class Drawn:
    """(3, 5) hidden states, a head, and K ids for each, distinct."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, **map: Any) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight, self.bias = draw(3, 5, H), draw(V, H), draw(V)
        self.ids = torch.rand(3, 5, V, generator=generator).topk(K).indices
        self.teacher_logps = (2 * draw(3, 5, V).double()).log_softmax(-1).gather(-1, self.ids)
        self.upstream = draw(3, 5, K).double()
        self.map = map

    def leaves(self) -> list[Tensor]:
        """Hidden, weight and bias, which need a gradient from now on."""
        own = [one.detach().requires_grad_() for one in (self.hidden, self.weight, self.bias)]
        self.hidden, self.weight, self.bias = own
        return own

    def logits(self) -> Tensor:
        """Over the vocabulary, in float64."""
        z = self.hidden.double() @ self.weight.double().t() + self.bias.double()
        z = z * self.map.get("logit_scale", 1.0)
        if (cap := self.map.get("softcap")) is not None:
            z = cap * torch.tanh(z / cap)
        return z / self.map.get("temperature", 1.0)


def close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    """To rounding of ``dtype``, as far as the largest number goes."""
    for a, b in zip(actual, expected, strict=True):
        size = b.detach().double().abs().nan_to_num(0, 0, 0).max()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            a.detach().double(),
            b.detach().double(),
            atol=float(16 * eps * (1 + size)),
            rtol=0,
            equal_nan=True,
        )
