# SPDX-License-Identifier: Apache-2.0
"""``linear_divergence``: how far two heads' distributions over the vocabulary lie apart, token by
token."""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives.checks import hint, is_integer, is_number
from .agreement import Own, agree, refused_together
from .api import MOST_PLANS, MOST_SIGNATURES, Asked, run
from .backends.divergence_formulas import DIVERGENCES
from .backends.divergences import unavailable_reason
from .head import Form, Head, Lora, Model
from .plan import Plan
from .request import make_model, make_request
from .rules.divergence import Divergence
from .sharded import local_parts
from .signature import Kept, signature_of
from .types import ScoringOptions
from .validation import check_two_heads, check_vocab_range

Kind = Literal["forward_kl", "reverse_kl", "jsd", "tv", "bhattacharyya", "cosine"]

SCORED, IGNORED = 0, -1  # pseudo-targets: positions matter here, not tokens


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: Kind = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    student_lora: Lora | None = None,
    teacher_lora: Lora | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    options: ScoringOptions | None = None,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """The divergence of a student's distribution over the vocabulary from a teacher's, per token,
    within a workspace that is bounded by ``options.memory_budget``.

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
        temperature, softcap, logit_scale: of both heads, as in ``linear_logprob``; temperature is
            a number.
        student_lora, teacher_lora: low-rank updates of the weights, as there.
        vocab_size: the ids below it take part, of both heads: of padded ones the tokenizer's
            length. None: those that both have. An id that both biases exclude with -inf takes part
            in no divergence either.
        tp_group, vocab_range: as there, of both weights, which hold the same ids on each rank; with
            ``vocab_size`` those of them below it, of which each rank must hold some.
        reduce_hidden_grad: as there, of student_hidden.
        options: see ScoringOptions; products run in the wider dtype of the two models.

    Returns:
        (...) float32 (float64 for float64 products), 0 where masked; differentiable with respect to
        the student.

    Cost: a product for each head and one for each of student_hidden and student_weight that needs a
    gradient; with both, rows that the memory budget does not hold are projected again in backward.
    Where memory runs out the call runs again with less, see ScoringOptions.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
        RuntimeError: on a second derivative, and on one in forward mode.
        torch.OutOfMemoryError: where 64 rows at a time do not fit.
    """
    arguments = locals()  # here those alone, by name
    with refused_together(tp_group):
        asked, target = _ask(**arguments)
    (value,) = run(asked, target)
    if value is None:
        raise RuntimeError("no divergence was asked for")
    return value


def explain_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    **arguments: Any,
) -> Plan:
    """How ``linear_divergence`` would run for the same arguments: the schedule, its cost in u (one
    u is a product of 2 N H V flop of the student) and its working memory in bytes.

    ``print(explain_divergence(...))`` gives one line. Nothing is computed.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, mask: of that call. Their
            shapes, dtypes and devices and whether they need a gradient count, of ``mask`` also
            which positions it keeps.
        arguments: the call's further ones, by keyword.

    Returns:
        Plan: ``schedule``, ``units`` and ``workspace_bytes``.

    Raises:
        ValueError, TypeError: as the call would.
    """
    given = student_hidden, student_weight, teacher_hidden, teacher_weight, mask
    bound = inspect.signature(linear_divergence).bind(*given, **arguments)
    bound.apply_defaults()
    asked, target = _ask(**bound.arguments)
    return asked.planned(target).plan


def _ask(**given: Any) -> tuple[Asked, Tensor]:
    """What is asked, checked, and (...) SCORED or IGNORED."""
    signature = signature_of(given)
    if signature is None:
        return _checked(**given)

    def known() -> _Known:
        asked, _ = _checked(**given)
        student, teacher = (model.head.form for model in asked.models)
        return _Known(asked._replace(models=[], plans=Kept(MOST_PLANS)), student, teacher)

    asked, student, teacher = _KEPT.of(signature, known)
    own = _model(given, "student_", student), _model(given, "teacher_", teacher).detached()
    return asked._replace(models=list(own)), _target(given["student_hidden"], given["mask"])


class _Known(NamedTuple):
    """What follows from a call's signature."""

    asked: Asked  # without models
    student: Form
    teacher: Form


_KEPT: Kept[_Known] = Kept(MOST_SIGNATURES)


def _model(given: dict[str, Any], side: str, form: Form) -> Model:
    hidden, weight, bias = (given[side + name] for name in ("hidden", "weight", "bias"))
    return Model(hidden, Head(weight, bias, None, None, form))


def _target(hidden: Tensor, mask: Tensor | None) -> Tensor:
    target = hidden.new_full(hidden.shape[:-1], SCORED, dtype=torch.int64)
    return target if mask is None else target.masked_fill(~mask, IGNORED)


def _checked(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    *,
    divergence: Kind,
    beta: float,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_lora: Lora | None,
    teacher_lora: Lora | None,
    vocab_size: int | None,
    vocab_range: tuple[int, int] | None,
    options: ScoringOptions | None,
    **shared: Any,
) -> tuple[Asked, Tensor]:
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}"
            f"{hint(divergence, DIVERGENCES)}"
        )
    _check_beta(beta)
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    (student_hidden, student_weight, student), (teacher_hidden, teacher_weight, teacher) = (
        local_parts(
            hidden, weight, {"bias": bias, "lora": lora, "vocab_range": vocab_range} | shared, name
        )
        for name, hidden, weight, bias, lora in (
            ("student_", student_hidden, student_weight, student_bias, student_lora),
            ("teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_lora),
        )
    )
    vocab_range = student["vocab_range"]
    check_two_heads(student_hidden, student_weight, teacher_hidden, teacher_weight, mask)
    target = _target(student_hidden, mask)
    columns, others = student_weight.shape[0], teacher_weight.shape[0]
    common = vocab_range
    if common is None and columns != others:
        if shared["tp_group"] is not None:
            raise ValueError(
                "student_weight and teacher_weight must hold the same ids on each rank, got "
                f"{columns} and {others} rows; pass vocab_range with tp_group"
            )
        common = 0, min(columns, others)
    if vocab_size is not None:
        held = min(columns, others)
        if vocab_range is not None:
            check_vocab_range(vocab_range, held)
        common = _ids_below(vocab_size, vocab_range, held, shared["tp_group"], student_weight)
    models, recording = [], torch.is_grad_enabled()
    for prefix, hidden, weight, head in (
        ("student_", student_hidden, student_weight, student),
        ("teacher_", teacher_hidden, teacher_weight, teacher),
    ):
        own = head | {"vocab_range": common, "prefix": prefix}
        with torch.set_grad_enabled(recording and prefix == "student_"):
            models.append(make_model(hidden, weight, target, **own))
    models[1] = models[1].detached()
    request = make_request(models, ignore_index=IGNORED, options=options)
    if request.options.schedule == "batches":
        raise ValueError(
            "schedule='batches' does not serve two heads; use schedule='auto', 'keep' or "
            "'recompute'"
        )
    reason = unavailable_reason(request.options.backend)
    if reason is not None:
        raise ValueError(f"backend={request.options.backend!r} is not available: {reason}")
    return Asked(request, Divergence(divergence, float(beta)), models), target


def _ids_below(
    vocab_size: int,
    ids: tuple[int, int] | None,
    columns: int,
    group: dist.ProcessGroup | None,
    weight: Tensor,
) -> tuple[int, int]:
    """Those of ``ids``; None: of the ``columns`` held here, and of all ranks' in their order.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected, and the remedy.
    """
    if not is_integer(vocab_size):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}; use int()")
    start, stop, least, most = 0, columns, 1, columns
    if ids is not None:
        start, stop = ids
        least, most = start + 1, max(stop, vocab_size)
    elif group is not None:
        if torch.compiler.is_compiling():
            raise ValueError("vocab_size under tp_group is not traced without vocab_range: pass it")
        agreed = agree(group, weight, Own(columns), {"vocab_size": vocab_size})
        sizes, start = agreed.columns, agreed.shard.start
        stop = start + columns
        # The same on all ranks, so that none goes on alone.
        least, most = sum(sizes[:-1]) + 1, sum(sizes)
    if not least <= vocab_size <= most:
        raise ValueError(
            f"vocab_size must be in [{least}, {most}], so that both heads and each rank hold ids "
            f"below it, got {vocab_size}; it counts the vocabulary without padding"
        )
    return start, min(stop, vocab_size)


def _check_beta(beta: Any) -> None:
    if not is_number(beta):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}; use float()")
    if not 0 <= float(beta) <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
