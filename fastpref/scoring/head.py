# SPDX-License-Identifier: Apache-2.0
"""A linear head over the vocabulary: what turns hidden states into logits.

A low-rank update of its weight widens the inner dimension of the products,

    hidden (weight + scale B A)^T = [hidden, scale hidden A^T] [weight, B]^T,

exact up to rounding, so that all that follows runs on the wide matrices unchanged (Hu et al.,
arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .basis import Basis
from .products import cut, product
from .slab import Slab
from .types import AS_IT_IS, LogitMap, in_dtype, statistics_dtype

# Given weight and bias: a context entered around every use of them, in backward too. ZeRO-3 gathers
# partitioned parameters here.
WeightContext = Callable[[Tensor, Tensor | None], AbstractContextManager[Any]]
Lora = tuple[Tensor, Tensor, float]  # A (r, H), B (V, r), scale


class Sharding(NamedTuple):
    """Whose ranks hold rows of a head each, and whether gradients of hidden are summed over them
    here."""

    group: dist.ProcessGroup
    reduces: bool = True


class Shard(NamedTuple):
    """The columns of the vocabulary that this rank holds, of those that all hold in rank order."""

    start: int  # first vocabulary id of this rank's
    total: int  # of all ranks together
    widest: int  # of the rank with the most


class Sizes(NamedTuple):
    """Of a head, what its costs follow from beside its columns."""

    inner: int  # of the products: H, with an update H + r
    trained: int  # inner columns of the weight gradient: all, an update's own, or a basis's
    copies_weight: bool  # products are of a copy
    rank: int = 0  # of a basis, of whose columns sums of squares are taken beside


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Of a head all but its tensors."""

    map: LogitMap
    columns: int | None = None  # rows of the weight in use; None: all
    start: int | None = None  # first vocabulary id of the weight; None: shards in rank order
    lora_scale: float = 0.0
    sharding: Sharding | None = None  # of the vocabulary
    context: WeightContext | None = None
    basis: Basis | None = None  # what the weight's gradient is projected on

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Over which the vocabulary is sharded."""
        return None if self.sharding is None else self.sharding.group

    @property
    def reducing_group(self) -> dist.ProcessGroup | None:
        """Over which gradients of hidden are summed here."""
        return self.group if self.sharding is not None and self.sharding.reduces else None


class Head(NamedTuple):
    """As the caller holds it, checked."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora_a: Tensor | None  # (r, H)
    lora_b: Tensor | None  # (V, r)
    form: Form

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    @property
    def lora(self) -> Lora | None:
        """As the caller gave it."""
        if self.lora_a is None or self.lora_b is None:
            return None
        return self.lora_a, self.lora_b, self.form.lora_scale

    @property
    def columns(self) -> int:
        """Rows of the weight in use."""
        return self.weight.shape[0] if self.form.columns is None else self.form.columns

    def sizes(self, dtype: torch.dtype) -> Sizes:
        """Of products in ``dtype``."""
        width, basis = self.weight.shape[1], self.form.basis
        copies = self.weight.dtype != dtype
        if basis is not None:
            return Sizes(width, basis.rank + basis.measured, copies, basis.rank)
        if self.lora_a is None:
            return Sizes(width, width, copies)
        rank = self.lora_a.shape[0]
        return Sizes(width + rank, rank, True)

    @property
    def trained_weight(self) -> Tensor:
        """The matrix that has those."""
        if self.form.basis is not None:
            return self.form.basis.given.out
        return self.weight if self.lora_b is None else self.lora_b

    def opened(self) -> AbstractContextManager[Any]:
        """Within it the weight and the bias hold their data."""
        return opened(self.form.context, self.weight, self.bias)

    def in_dtype(self, dtype: torch.dtype, shard: Shard) -> Projector:
        """What multiplies rows in ``dtype``."""
        form, used = self.form, slice(0, self.columns)
        weight, bias, trained = in_dtype(cut(self.weight, used), dtype), self.bias, 0
        if self.lora_b is not None:
            trained = weight.shape[1]
            weight = torch.cat([weight, self.lora_b[used].to(dtype)], dim=1)
        if bias is not None:
            bias = bias[used].to(statistics_dtype(dtype)).contiguous()
        start = shard.start if form.start is None else form.start
        return Projector(weight, bias, form.map, start, shard.total, trained, form.basis)

    def widened(self, rows: Tensor, room: int) -> Tensor:
        """(N, H) -> (N, H + r) with an update; ``room`` is that of products.py."""
        if self.lora_a is None:
            return rows
        update = product(rows, self.lora_a.to(rows.dtype).t(), room) * self.form.lora_scale
        return torch.cat([rows, update], dim=1)

    def narrowed(self, gradient: Tensor, rows: Tensor, room: int) -> tuple[Tensor, Tensor | None]:
        """The gradient at wide ``rows``, (N, H + r) -> at their H columns, and at A."""
        a = self.lora_a
        if a is None:
            return gradient, None
        width = a.shape[1]
        own, update = gradient[:, :width], gradient[:, width:] * self.form.lora_scale
        own = own + product(update, a.to(update.dtype), room)
        return own, product(update.t(), rows[:, :width], room)

    def by_tensor(
        self, d_weight: Tensor | None, d_bias: Tensor | None, d_a: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the trained matrix, the bias and A in the order of ``tensors``, 0 in rows
        beyond those in use. What is projected on a basis is none of a tensor's."""
        d_bias = _padded(d_bias, self.bias)
        if self.form.basis is not None:
            return None, d_bias, None, None
        if self.lora_b is None:
            return _padded(d_weight, self.weight), d_bias, None, None
        return None, d_bias, d_a, _padded(d_weight, self.lora_b)


class Projector(NamedTuple):
    """A head's columns in the dtype of their products: vocabulary ids ``start`` to ``start +
    weight.shape[0]``."""

    weight: Tensor  # (V, H), V the columns held here; an update widens H
    bias: Tensor | None  # (V,), statistics dtype
    map: LogitMap
    start: int = 0
    vocab_size: int = 0  # columns held by all ranks together
    trained: int = 0  # first inner column with a weight gradient, where the weight has one
    basis: Basis | None = None  # what it is projected on

    @property
    def trained_size(self) -> int:
        """Columns of the weight gradient."""
        return self.weight.shape[1] - self.trained if self.basis is None else self.basis.rank

    def trained_rows(self, rows: Tensor, room: int) -> Tensor:
        """Of rows what the weight gradient is formed with: their columns from ``trained`` on, or
        their projection on a basis and what is measured beside it."""
        if self.basis is not None:
            return product(rows, self.basis.matrix(rows.dtype), room)
        return rows[:, self.trained :] if self.trained else rows

    def slab(self, columns: slice | None = None) -> Slab:
        if columns is None:
            return Slab(self.weight, self.bias, self.map)
        bias = None if self.bias is None else self.bias[columns]
        return Slab(cut(self.weight, columns), bias, self.map)


class Model(NamedTuple):
    """Hidden states and the head they go through."""

    hidden: Tensor  # (..., H)
    head: Head

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.hidden, *self.head.tensors)

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], form: Form) -> Model:
        """The inverse of ``tensors``."""
        hidden, weight, bias, a, b = tensors
        if hidden is None or weight is None:
            raise TypeError("a model needs hidden states and a weight")
        return cls(hidden, Head(weight, bias, a, b, form))

    def detached(self) -> Model:
        own = [None if one is None else one.detach() for one in self.tensors]
        return Model.of(own, self.head.form)


TENSORS = 1 + len(Head._fields[:4])  # of a model


def opened(
    context: WeightContext | None, weight: Tensor, bias: Tensor | None
) -> AbstractContextManager[Any]:
    """Within it ``weight`` and ``bias`` hold their data."""
    if context is None:
        return AS_IT_IS
    found = context(weight, bias) if callable(context) else None
    if not isinstance(found, AbstractContextManager):
        got = "None" if found is None else type(found).__name__
        got = f"a function that returned {got}" if callable(context) else type(context).__name__
        raise TypeError(
            "weight_context must be a function of weight and bias that returns a context, got "
            f"{got}; contextlib.contextmanager makes one of a generator"
        )
    return found


def _padded(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient of the rows in use, 0 in rows beyond them."""
    if gradient is None or like is None or gradient.shape[0] == like.shape[0]:
        return gradient
    padded = gradient.new_zeros(like.shape)
    padded[: gradient.shape[0]] = gradient
    return padded
