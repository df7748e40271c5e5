# SPDX-License-Identifier: Apache-2.0
"""``linear_divergence``: how far two heads' distributions over the vocabulary lie apart, token by
token."""

from __future__ import annotations

import numbers
from typing import Any, Literal

import torch
from torch import Tensor

from . import two_head_operators
from .backends.divergences import DIVERGENCES
from .divergence_products import Call, LinearDivergence, flat
from .request import Lora
from .two_heads import ask_two_heads
from .types import ScoringOptions

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
    Where memory runs out the call runs again with less, see ScoringOptions.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        RuntimeError: on a second derivative.
        torch.OutOfMemoryError: where 64 rows at a time do not fit.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}")
    _check_beta(beta)
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    question, student, teacher = ask_two_heads(
        (student_hidden, student_weight, student_bias, student_lora),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_lora),
        mask,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        options=options,
    )
    kind = divergence, float(beta)
    if torch.compiler.is_compiling():
        return two_head_operators.divergence(question, student, teacher, *kind)
    call = Call(question.heads(student, teacher), *kind)
    value: Tensor = LinearDivergence.apply(  # type: ignore[no-untyped-call]
        call, *flat(student), *flat(teacher)
    )
    return value


def _check_beta(beta: Any) -> None:
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}; use float()")
    if not 0 <= float(beta) <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
