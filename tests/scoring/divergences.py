# SPDX-License-Identifier: Apache-2.0
"""Divergences of two tiles of raw products in plain torch, by autograd, and tiles to try."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.scoring.slab import Products
from fastpref.scoring.types import LogitMap

# In the order of their numbers.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tv", "bhattacharyya", "cosine")


class Tiles(NamedTuple):
    student: Tensor
    teacher: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    map: LogitMap = LogitMap(1.0, 0.0)

    def to(self, dtype: torch.dtype) -> Tiles:
        """Tiles of ``dtype``, biases in that of its statistics."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        biases = (None if one is None else one.to(exact) for one in self[2:4])
        return Tiles(self.student.to(dtype), self.teacher.to(dtype), *biases, self.map)

    @property
    def products(self) -> tuple[Products, Products]:
        student = Products(self.student, self.student_bias, self.map)
        return student, Products(self.teacher, self.teacher_bias, self.map)

    def logits(self) -> tuple[Tensor, Tensor]:
        both = zip(self[:2], self[2:4], strict=True)
        student, teacher = (self.map.logit(z if b is None else z + b) for z, b in both)
        return student, teacher


def random_tiles(rows: int, cols: int, *, spread: float = 3.0, apart: float | None = None) -> Tiles:
    """Logits of standard deviation ``spread``; the teacher's independent, or ``apart`` from the
    student's and a constant above."""
    student = torch.randn(rows, cols, dtype=torch.float64) * spread
    noise = torch.randn(rows, cols, dtype=torch.float64)
    teacher = noise * spread if apart is None else student + apart * noise + 0.7
    return Tiles(student, teacher)


def with_bias(tiles: Tiles, student: bool = True, teacher: bool = True) -> Tiles:
    cols = tiles.student.shape[1]
    biases = (
        torch.randn(cols, dtype=torch.float64) * 2 if on else None for on in (student, teacher)
    )
    return Tiles(tiles.student, tiles.teacher, *biases, tiles.map)


def masked(tiles: Tiles, student: int, teacher: int) -> Tiles:
    """The last of the columns masked by biases."""
    cols = tiles.student.shape[1]
    biases = (torch.zeros(cols, dtype=torch.float64) for _ in range(2))
    student_bias, teacher_bias = biases
    student_bias[cols - student :] = -torch.inf
    teacher_bias[cols - teacher :] = -torch.inf
    return Tiles(tiles.student, tiles.teacher, student_bias, teacher_bias)


def weighted(p: Tensor, value: Tensor) -> Tensor:
    """sum p value over the columns of a probability, also where the value is infinite elsewhere."""
    return (p * torch.where(p > 0, value, 0.0)).sum(1)


def divergence(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """Of logits."""
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=1, eps=0.0)
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        return weighted(p, log_p - log_q)
    if kind == "reverse_kl":
        return weighted(q, log_q - log_p)
    if kind == "jsd":
        m = (1 - beta) * q + beta * p
        log_m = torch.where(m > 0, m, 1.0).log()
        return beta * weighted(p, log_p - log_m) + (1 - beta) * weighted(q, log_q - log_m)
    if kind == "tv":
        return (q - p).abs().sum(1) / 2
    return -((log_p + log_q) / 2).exp().sum(1).log()


def value_and_gradient(tiles: Tiles, kind: str, beta: float) -> dict[str, Tensor]:
    """The gradient is that of the student's products, in the tiles' dtype; 16-bit tiles are
    computed with in float32."""
    wide = torch.promote_types(tiles.student.dtype, torch.float32)
    leaf = tiles.student.detach().to(wide).requires_grad_()
    student, teacher = tiles._replace(student=leaf, teacher=tiles.teacher.to(wide)).logits()
    value = divergence(student, teacher, kind, beta)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return {"value": value.detach(), "gradient": gradient.to(tiles.student.dtype)}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the values."""
    return float((actual.double() - exact).norm() / exact.norm())
