# SPDX-License-Identifier: Apache-2.0
"""The loss of TRL's distillation trainers by ``linear_divergence``."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ...scoring import linear_divergence, linear_logprob
from .adapters import products_in_hidden_dtype
from .sharding import gathered

logger = logging.getLogger("fastpref")

Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]


class DivergenceLoss:
    """Stands for ``_chunked_divergence_loss``: the generalised Jensen-Shannon divergence of GKD
    (arXiv:2306.13649), beta = 0 the forward KL, KL(teacher, student), and 1 the reverse.

    Called as TRL's own, and returns the same: the loss, a sum over the positions that count divided
    by ``num_items_in_batch`` or their number; the sum of the student's entropies in nats, without
    gradient; and how many positions count. What ``linear_divergence`` does not do, TRL's own does,
    and the log says so once.
    """

    def __init__(self, own: Loss) -> None:
        self.own = own
        self.__signature__ = inspect.signature(own)
        self.said: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        reason = divergence_supported(given)
        if reason is not None:
            if reason not in self.said:
                self.said.add(reason)
                logger.warning("TRL's own divergence serves: %s", reason)
            return self.own(*args, **kwargs)
        return _loss(given)


def divergence_supported(given: dict[str, Any]) -> str | None:
    """Why ``linear_divergence`` cannot serve a call with these arguments, or None."""
    for name in ("logit_scale", "final_logit_softcapping"):
        student, teacher = given[f"student_{name}"], given[f"teacher_{name}"]
        if student != teacher:
            return f"{name} is {student} of the student and {teacher} of the teacher"
    deepspeed = importlib.import_module("transformers.integrations.deepspeed")
    if deepspeed.is_deepspeed_zero3_enabled():
        return "heads are partitioned (ZeRO-3)"
    return None


def _loss(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, beta = given["student_hidden_states"], given["beta"]
    weight, bias, teacher_weight, teacher_bias = (
        gathered(given[name])
        for name in (
            "student_lm_head_weight",
            "student_lm_head_bias",
            "teacher_lm_head_weight",
            "teacher_lm_head_bias",
        )
    )
    weight, teacher_weight = cast(Tensor, weight), cast(Tensor, teacher_weight)
    mask = given["completion_mask"] != 0
    head = {
        "temperature": given["temperature"],
        "logit_scale": given["student_logit_scale"],
        "softcap": given["student_final_logit_softcapping"],
    }
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    if beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    with products_in_hidden_dtype(hidden, weight):
        divergences = linear_divergence(
            hidden,
            weight,
            given["teacher_hidden_states"],
            teacher_weight,
            mask,
            divergence=kind,
            beta=beta,
            student_bias=bias,
            teacher_bias=teacher_bias,
            **head,
        )
        with torch.no_grad():
            target = torch.zeros_like(mask, dtype=torch.int64).masked_fill(~mask, -100)
            scores = linear_logprob(hidden, weight, target, bias=bias, outputs=("entropy",), **head)
    count = mask.sum()
    items = given["num_items_in_batch"]
    items = count.clamp(min=1) if items is None else items
    if isinstance(items, Tensor):
        items = items.to(divergences.device)
    entropies = cast(Tensor, scores.entropy).float().sum()
    return divergences.float().sum() / items, entropies, count
