# SPDX-License-Identifier: Apache-2.0
"""Squared errors of predictions, one number a sample, and their difference without cancellation.

With d = model - ref and R the sum over a sample's elements, or their mean:
    gap       = R[d (d + 2 (ref - target))]   the model's error less the reference's
    model     = R[(model - target)^2]
    reference = R[(ref - target)^2]
Where the two predictions agree to four digits, the difference of the last two has none left in
float32. Both gap and model have the gradient 2 (model - target), over R's count for a mean: one
backward, which does not read the reference.

Arithmetic is in float32, in float64 where a tensor is. What runs: an operator in C++ on the CPU
(csrc/cpu/squared_errors.inl), a Triton kernel on GPUs (kernels/squared_errors.py), else plain
torch, which is also what traces or transforms the call.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._extension import untransformed
from . import backends
from .checks import Reduction
from .layout import walk


class SquaredErrors(NamedTuple):
    """(B,) each, float32 or float64."""

    gap: Tensor  # of the model less that of the reference; differentiable
    model: Tensor  # differentiable
    reference: Tensor  # a constant


def squared_errors(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    reduction: Reduction,
    mask: Tensor | None = None,
) -> SquaredErrors:
    """Both squared errors of each sample and their difference, with gradients to ``model_pred``.

    Arguments are those of ``log_ratio``, checked before.
    """
    return SquaredErrors(*_reduced(model_pred, ref_pred, target, reduction, mask))


def squared_error(
    pred: Tensor, target: Tensor, *, reduction: Reduction, mask: Tensor | None = None
) -> Tensor:
    """(B,), the squared error of each sample, with a gradient to ``pred``; arguments as above."""
    _, error, _ = _reduced(pred, None, target, reduction, mask)
    return error


def _reduced(
    model: Tensor, ref: Tensor | None, target: Tensor, reduction: Reduction, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    ref = None if ref is None else ref.detach()
    target = target.detach()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    if model.dim() == 1:  # one element a sample
        model, target = model.unsqueeze(1), target.unsqueeze(1)
        ref = None if ref is None else ref.unsqueeze(1)
        mask = mask.unsqueeze(-1) if mask is not None and mask.dim() else mask
    size = math.prod(model.shape[1:])
    divisor = max(size, 1) if reduction == "mean" and mask is None else 1
    errors: tuple[Tensor, Tensor, Tensor]
    if model.numel() and untransformed(model, ref, target, mask):
        errors = _SquaredErrors.apply(model, ref, target, mask, divisor)  # type: ignore[no-untyped-call]
    else:
        errors = _differentiable(model, ref, target, mask, divisor)
    if reduction == "sum" or mask is None:
        return errors
    counts = element_counts(mask, model)
    gap, error, reference = (one / counts if one.numel() else one for one in errors)
    return gap, error, reference


def element_counts(mask: Tensor | None, like: Tensor) -> Tensor | int:
    """How many elements of each sample are left in, 1 where none is: (B,), or (1,) or a number
    where all have the same."""
    if mask is None:
        return max(1, math.prod(like.shape[1:]))
    mask = mask != 0
    if like.dim() == 1:  # one element a sample
        like, mask = like.unsqueeze(1), mask.unsqueeze(-1) if mask.dim() else mask
    own = mask.reshape((1,) * (like.dim() - mask.dim()) + mask.shape)
    each = math.prod(like.shape[1:]) // max(1, math.prod(own.shape[1:]))
    return (own.flatten(1).sum(1) * each).clamp(min=1)


def _differentiable(
    model: Tensor, ref: Tensor | None, target: Tensor, mask: Tensor | None, divisor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(gap, model, reference), by operations that torch differentiates, traces and transforms."""
    exact = backends.exact_dtype(model, ref, target)
    kept = [
        None
        if one is None
        else one.to(exact)
        if mask is None
        else torch.where(mask, one.to(exact), 0.0)
        for one in (model, ref, target)
    ]
    p, r, t = cast(tuple[Tensor, Tensor | None, Tensor], kept)
    dims = tuple(range(1, p.dim()))

    def reduced(terms: Tensor) -> Tensor:
        return terms.sum(dims) / divisor

    if r is None:
        none = p.new_empty(0)
        return none, reduced((p - t).square()), none
    d, u = p - r, r - t
    return reduced(d * (d + 2 * u)), reduced((p - t).square()), reduced(u.square())


class _SquaredErrors(torch.autograd.Function):
    """(gap, model, reference) of what nothing transforms; keeps nothing but its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        model: Tensor,
        ref: Tensor | None,
        target: Tensor,
        mask: Tensor | None,
        divisor: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = [model, target] if ref is None else [model, target, ref]
        (model_view, target_view, *ref_view), kept = walk(given, mask)[1:]
        views = model_view, ref_view[0] if ref_view else None, target_view, kept
        found = backends.of(*views).squared_errors(*views, divisor)
        ctx.save_for_backward(model, target, mask)
        ctx.divisor = divisor
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    def backward(
        ctx: Any, grad_gap: Tensor | None, grad_model: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        model, target, mask = ctx.saved_tensors
        upstream = [one for one in (grad_gap, grad_model) if one is not None]
        if not upstream:
            return None, None, None, None, None
        factor = sum(upstream[1:], upstream[0]) * (2 / ctx.divisor)
        if torch.is_grad_enabled():
            gradient = _plain_gradient(model, target, mask, factor)
        else:
            (_, out, _), (model_view, out_view, target_view), kept = walk(
                [model, torch.empty_like(model), target], mask
            )
            serving = backends.of(model_view, None, target_view, kept)
            serving.error_gradient(out_view, model_view, target_view, kept, factor.contiguous())
            gradient = out
        return gradient, None, None, None, None


def _plain_gradient(model: Tensor, target: Tensor, mask: Tensor | None, factor: Tensor) -> Tensor:
    """factor (model - target), differentiable itself."""
    exact = factor.dtype
    apart = model.to(exact) - target.to(exact)
    if mask is not None:
        apart = torch.where(mask, apart, 0.0)
    return (factor.view(-1, *[1] * (model.dim() - 1)) * apart).to(model.dtype)
