# SPDX-License-Identifier: Apache-2.0
"""``linear_divergence``: how far two heads' distributions over the vocabulary lie apart, token by
token.

Tiles of both heads' raw products are formed side by side and reduced to a number a row; where a
gradient is needed the student's tile becomes G, the divergence's gradient with respect to the
student's raw products. The upstream gradient g of a row only ever scales rows:

    d hidden = g (G W),   d weight = G^T (g hidden),   d bias = G^T g.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .autograd import (
    by_parameter,
    like_parameters,
    once_differentiable,
    packed_rows,
    products_of,
    row_gradients,
)
from .backends.divergences import KINDS, divergence_rows
from .backward import Gradients, add_column_sums, add_product
from .request import Lora, Parameters
from .two_heads import Model, Tiles, TwoHeads, prepare_two_heads
from .types import ScoringOptions, statistics_dtype
from .workspace import Lease

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tv", "bhattacharyya", "cosine"]


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    student_lora: Lora | None = None,
    teacher_lora: Lora | None = None,
    options: ScoringOptions | None = None,
) -> Tensor:
    """The divergence of a student's distribution over the vocabulary from a teacher's, per token,
    without ever holding the (tokens, vocabulary) logits of either.

    With q the student's softmax and p the teacher's:

    - "forward_kl": KL(p, q) = sum p log(p / q), as in distillation.
    - "reverse_kl": KL(q, p).
    - "jsd": beta KL(p, m) + (1 - beta) KL(q, m), m = (1 - beta) q + beta p; as in GKD
      (arXiv:2306.13649) beta = 0 is the forward and beta = 1 the reverse KL, which are not its
      limits.
    - "tv": sum |p - q| / 2.
    - "bhattacharyya": -log sum sqrt(p q).
    - "cosine": one minus the cosine of the two rows of logits.

    Args:
        student_hidden: (..., H), float64, float32, bfloat16 or float16.
        student_weight: (V, H).
        teacher_hidden: (..., H'). Never given a gradient, nor is its head.
        teacher_weight: (V', H'). Where the vocabularies differ in size, by padding, the ids that
            both have take part.
        mask: (...) bool, True where the divergence is wanted; elsewhere hidden is not read. None:
            everywhere.
        beta: in [0, 1], of "jsd".
        student_bias, teacher_bias: (V,) and (V',), or None.
        temperature, softcap, logit_scale: of both heads, as in ``linear_logprob``.
        student_lora, teacher_lora: low-rank updates of the weights, as there.
        options: see ScoringOptions; products run in the wider dtype of the two models.

    Returns:
        (...) float32 (float64 for float64 products), 0 where masked; differentiable with respect to
        the student.

    Cost: a product for each head and one for each of student_hidden and student_weight that needs a
    gradient; with both, rows that the memory budget does not hold are projected again in backward.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        RuntimeError: on a second derivative.
    """
    if divergence not in KINDS:
        raise ValueError(f"divergence must be one of {', '.join(KINDS)}; got {divergence!r}")
    _check_beta(beta)
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    heads, student, teacher = prepare_two_heads(
        (student_hidden, student_weight, student_bias, student_lora),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_lora),
        mask,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        options=options,
    )
    value: Tensor = LinearDivergence.apply(  # type: ignore[no-untyped-call]
        Call(heads, divergence, float(beta)), *flat(student), *flat(teacher)
    )
    return value


class Call(NamedTuple):
    heads: TwoHeads
    divergence: str
    beta: float

    def rows(self, student: Tensor, teacher: Tensor, tiles: Tiles, write: bool) -> Tensor:
        """(rows,); with ``write`` the student's tile becomes G."""
        return divergence_rows(
            student,
            teacher,
            tiles.student.bias,
            tiles.teacher.bias,
            tiles.student.map,
            self.divergence,
            self.beta,
            write,
        )


def _check_beta(beta: Any) -> None:
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}; use float()")
    if not 0 <= float(beta) <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")


class LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        student, teacher = models(tensors)
        with products_of(student.hidden):
            values, kept, direct = run_forward(call, student.detached(), teacher)
            out = call.heads.packing.spread(values).view(student.hidden.shape[:-1])
        if call.heads.plan.needs_grad:
            ctx.save_for_backward(*tensors, kept, direct)
            ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept, direct = ctx.saved_tensors
        student, teacher = models(tensors)
        with torch.no_grad(), products_of(student.hidden):
            gradients = run_backward(ctx.call, student, teacher, kept, direct, upstream)
        once = once_differentiable(gradients, (*flat(student), upstream))
        return (None, *once, *[None] * len(flat(teacher)))


def run_forward(
    call: Call, student: Model, teacher: Model
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(N,) values; G of the kept rows; G W of all rows where only hidden needs a gradient."""
    plan, tiles = call.heads.plan, Tiles.of(call.heads, student, teacher)
    kept = direct = None
    if plan.kept_rows:
        kept = Lease((plan.kept_rows, plan.vocab_size), plan.dtype, tiles.rows.device).tensor
    if plan.schedule == "direct":
        direct = torch.empty_like(tiles.rows)
    values = [tiles.rows.new_empty(0, dtype=statistics_dtype(plan.dtype))]
    for rows in plan.chunks(0, plan.scored):
        keeps = kept is not None and rows.stop <= plan.kept_rows
        own, other = tiles.project(rows, kept[rows] if kept is not None and keeps else None)
        values.append(call.rows(own, other, tiles, write=keeps or direct is not None))
        if direct is not None:
            torch.mm(own, tiles.student.weight, out=direct[rows])
    return torch.cat(values), kept, direct


def run_backward(
    call: Call,
    student: Model,
    teacher: Model,
    kept: Tensor | None,
    direct: Tensor | None,
    upstream: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients at the student's hidden states and parameters."""
    heads, (hidden, parameters) = call.heads, student
    exact = statistics_dtype(heads.plan.dtype)
    g = heads.packing.gather(upstream.reshape(-1).to(exact)).contiguous()
    if direct is not None:
        rows = packed_rows(heads.student, hidden, parameters)
        d_wide = heads.student.backend.scale_rows(direct, g, torch.empty_like(direct))
        gradients = Gradients(d_wide, None, None)
    else:
        tiles = Tiles.of(heads, student, teacher)
        rows, gradients = tiles.rows, _products(call, tiles, kept, g)
    d_hidden = d_a = None
    if gradients.hidden is not None:
        d_wide = gradients.hidden.masked_fill_((g == 0)[:, None], 0)
        d_rows, d_a = row_gradients(heads.student, d_wide, rows, parameters)
        d_hidden = heads.packing.spread(d_rows).view(hidden.shape).to(hidden.dtype)
    return d_hidden, *like_parameters(by_parameter(gradients, d_a, parameters), parameters)


def _products(call: Call, tiles: Tiles, kept: Tensor | None, g: Tensor) -> Gradients:
    """Kept rows in one product, the others chunk by chunk, their G formed again."""
    plan, backend = call.heads.plan, call.heads.student.backend
    head, exact = tiles.student, statistics_dtype(plan.dtype)
    chunks = plan.chunks(plan.kept_rows, plan.scored)
    if kept is not None:
        chunks = [slice(0, plan.kept_rows), *chunks]
    d_hidden = d_weight = d_bias = None
    if plan.needs_hidden:
        d_hidden = torch.empty_like(tiles.rows)
    if plan.needs_bias:
        d_bias = g.new_zeros(plan.vocab_size, dtype=torch.float64)
    if plan.needs_weight:
        shape = plan.vocab_size, head.weight.shape[1] - head.trained
        # 16-bit products of several chunks add up in float32.
        d_weight = g.new_empty(shape, dtype=plan.dtype if len(chunks) == 1 else exact)
        if not chunks:
            d_weight.zero_()
    for rows in chunks:
        if kept is not None and rows.stop <= plan.kept_rows:
            matrix = kept
        else:
            matrix, other = tiles.project(rows)
            call.rows(matrix, other, tiles, write=True)
        if d_weight is not None:
            own = tiles.rows[rows, head.trained :]
            own = backend.scale_rows(own, g[rows], torch.empty_like(own))
            add_product(d_weight, matrix.t(), own, first=rows is chunks[0])
        if d_hidden is not None:
            part = torch.mm(matrix, head.weight, out=d_hidden[rows])
            backend.scale_rows(part, g[rows], part)
        if d_bias is not None:
            add_column_sums(d_bias, matrix, g[rows])
    return Gradients(d_hidden, d_weight, d_bias)


def flat(model: Model) -> tuple[Tensor | None, ...]:
    return (model.hidden, *model.parameters)


def models(tensors: Sequence[Tensor | None]) -> tuple[Model, Model]:
    """From ``flat`` student and teacher."""
    half = len(tensors) // 2
    student, teacher = tensors[:half], tensors[half:]
    return _model(*student), _model(*teacher)


def _model(hidden: Tensor | None, *parameters: Tensor | None) -> Model:
    if hidden is None:
        raise TypeError("a model without hidden states")
    return Model(hidden, Parameters(*parameters))  # type: ignore[arg-type]
