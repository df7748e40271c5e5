# SPDX-License-Identifier: Apache-2.0
"""Whether a backend is right on this device: a handful of direct comparisons with float64, the most
telling first, each a call that may take its process down."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ScoringOptions, linear_divergence, linear_logprob
from ..scoring.backends.divergences import unavailable_reason as divergence_unavailable
from ..scoring.plain_scores import plain_scores
from ..scoring.statistics import DIFFERENTIABLE, OUTPUTS
from ..scoring.types import Schedule
from .contract import Named, worst
from .experiment import Mode
from .heard import warnings
from .lanes import Lane

PLAIN = ("logp",)
TIED = 64  # in units of the dtype: which of two logits so close is greater is decided by rounding
CPU_VOCAB = 5000  # where the flow is tried; float64 products there take their time


@dataclass(frozen=True)
class Check:
    """Arguments of one call. The sizes are three tiles of rows, columns that no tile divides, and
    rows of the weight that bulk copies take."""

    dtype: str = "bfloat16"
    outputs: tuple[str, ...] = PLAIN
    rows: int = 300
    width: int = 136
    vocab: int = 2056
    softcap: float | None = None
    bias: bool = False
    overflowing: float = 0.0  # share of the targets that lie 100 to 1000 nats below all else
    mode: Mode = "trainable head"
    schedule: Schedule = "auto"
    chunk_rows: int | None = None
    budget: int | None = None
    divergence: str | None = None  # instead of scores


RAGGED: dict[str, Any] = {"width": 133, "vocab": 2051}
SLABS: dict[str, Any] = {"schedule": "recompute", "chunk_rows": 128, "budget": 1 << 18}

CHECKS = {
    "bf16": Check(),
    "bf16, no gradient": Check(mode="forward"),
    "bf16, frozen head": Check(mode="frozen head"),
    "bf16, every output": Check(outputs=OUTPUTS),
    "bf16, every output, no gradient": Check(outputs=OUTPUTS, mode="forward"),
    "fp32": Check("float32"),
    "fp16": Check("float16"),
    "bf16, overflowing": Check(overflowing=0.05),
    "bf16, every output, overflowing": Check(outputs=OUTPUTS, overflowing=0.05),
    "bf16, H=133, V=2051": Check(**RAGGED),
    "bf16, one row": Check(rows=1),
    "bf16, 129 rows": Check(rows=129),
    "bf16, V=128256": Check(rows=64, vocab=128256),
    "bf16, recomputed in slabs": Check(**SLABS),
    "bf16, softcap": Check(softcap=5.0),
    "bf16, bias": Check(bias=True),
    "fp16, every output, overflowing": Check("float16", OUTPUTS, overflowing=0.05),
    "fp32, every output, softcap and bias, in slabs": Check(
        "float32", OUTPUTS, softcap=5.0, bias=True, **SLABS
    ),
    "fp32, H=133, V=2051, overflowing": Check("float32", overflowing=0.05, **RAGGED),
    "bf16, forward KL": Check(divergence="forward_kl"),
    "fp32, reverse KL": Check("float32", divergence="reverse_kl"),
    "bf16, JSD, frozen head": Check(divergence="jsd", mode="frozen head"),
}


def check(name: str, lane: Lane, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """A row of the report: whether the case ``name`` of ``CHECKS`` keeps the error contract, and
    by what share of it, at which tensor."""
    said = warnings()
    begin = time.perf_counter()
    one = CHECKS[name]
    away = divergence_unavailable(cast(Any, lane.backend)) if one.divergence else None
    if away is not None:
        return {"lane": lane.name, "case": name, "passed": None, "reason": away, "seconds": 0.0}
    if device == "cpu":
        one = replace(one, vocab=min(one.vocab, CPU_VOCAB))
    tensors = _tensors(one, device)
    run = _divergence if one.divergence else _scores
    with lane.tiles():
        options = lane.options(
            schedule=one.schedule, chunk_rows=one.chunk_rows, memory_budget=one.budget
        )
        found = run(one, tensors, options)
    exact = run(one, {key: value.double() for key, value in tensors.items()}, None)
    eager = run(one, tensors, None)
    tied = _without_ties(found, eager, exact, one)
    reason = "is_top1 is wrong where rounding does not decide it" if tied else None
    found, eager, exact = (
        {key: value for key, value in each.items() if value.dtype != torch.bool and key != "margin"}
        for each in (found, eager, exact)
    )
    share = worst(found, eager, exact)
    # What another backend stood in for says nothing of this one.
    reason = "; ".join(said) if said else reason
    return {
        "lane": lane.name,
        "case": name,
        "passed": share.share <= 1 and reason is None,
        "share": share.share,
        "worst": share.name,
        "error": share.error,
        "reason": reason,
        "seconds": time.perf_counter() - begin,
    }


def _tensors(one: Check, device: str) -> Named:
    """Inputs and upstream gradients of both signs, some of them 0. Drawn on the CPU: the same
    numbers on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float32, device="cpu")

    hidden = normal(one.rows, one.width)
    weight = normal(one.vocab, one.width) * (3 / one.width**0.5)
    target = torch.randint(
        one.vocab, (one.rows,), generator=generator, device="cpu", dtype=torch.int64
    )
    if one.overflowing:
        rare = 40
        weight[:rare, 0] = -torch.linspace(100, 1000, rare, device="cpu", dtype=torch.float32)
        hidden[:, 0] = 1
        every = round(1 / one.overflowing)
        target = rare + target % (one.vocab - rare)
        target[::every] %= rare
    dtype = getattr(torch, one.dtype)
    found = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "target": target}
    if one.bias:
        found["bias"] = normal(one.vocab).to(dtype)
    if one.divergence:
        found["teacher"] = (hidden + 0.3 * normal(*hidden.shape)).to(dtype)
        found["teacher_weight"] = (weight + 0.1 * normal(*weight.shape)).to(dtype)
    for output in DIFFERENTIABLE:
        upstream = normal(one.rows)
        upstream[3::7] = 0
        found[f"upstream {output}"] = upstream
    return {key: value.to(device) for key, value in found.items()}


def _leaves(one: Check, tensors: Named) -> Named:
    names: dict[Mode, tuple[str, ...]] = {
        "forward": (),
        "frozen head": ("hidden",),
        "trainable head": ("hidden", "weight", "bias"),
    }
    wanted = [key for key in names[one.mode] if key in tensors]
    return {key: tensors[key].detach().requires_grad_() for key in wanted}


def _scores(one: Check, tensors: Named, options: ScoringOptions | None) -> Named:
    """Outputs and gradients: of linear_logprob, or without options of the whole logits."""
    leaves = _leaves(one, tensors)
    given: dict[str, Any] = {
        key: tensors[key] for key in ("hidden", "weight", "bias") if key in tensors
    }
    given |= leaves
    target = tensors["target"].long()
    if options is None:
        scores = plain_scores(target=target, softcap=one.softcap, **given)
    else:
        scores = linear_logprob(
            target=target, softcap=one.softcap, outputs=one.outputs, options=options, **given
        )
    found = {key: getattr(scores, key) for key in one.outputs}
    wanted = [key for key in DIFFERENTIABLE if key in one.outputs]
    upstream = [tensors[f"upstream {key}"].to(found[key].dtype) for key in wanted]
    if leaves:
        torch.autograd.backward([found[key] for key in wanted], upstream)
    if options is None and "is_top1" in found:
        with torch.no_grad():
            found["margin"] = _margin(given, target, one.softcap)
    return _detached(found, leaves)


def _margin(given: Named, target: Tensor, softcap: float | None) -> Tensor:
    """By how much the target's logit exceeds the greatest other."""
    logits = given["hidden"] @ given["weight"].t()
    if "bias" in given:
        logits = logits + given["bias"]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    own = logits.gather(1, target[:, None])
    return (own - logits.scatter(1, target[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]


def _without_ties(found: Named, eager: Named, exact: Named, one: Check) -> bool:
    """Whether ``is_top1`` is wrong where rounding does not decide it."""
    if "is_top1" not in found:
        return False
    margin = exact["margin"]
    clear = margin.abs() > TIED * torch.finfo(getattr(torch, one.dtype)).eps
    return bool(((found["is_top1"] != (margin > 0)) & clear).any())


def _divergence(one: Check, tensors: Named, options: ScoringOptions | None) -> Named:
    leaves = _leaves(one, tensors)
    student = leaves["hidden"], leaves.get("weight", tensors["weight"])
    teacher = tensors["teacher"], tensors["teacher_weight"]
    kind: Any = one.divergence
    if options is None:
        value = _by_hand(kind, *(_logits(*pair).log_softmax(-1) for pair in (student, teacher)))
    else:
        value = linear_divergence(*student, *teacher, divergence=kind, options=options)
    value.backward(tensors["upstream logp"].to(value.dtype))
    return _detached({"divergence": value}, leaves)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _by_hand(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Of log-probabilities."""
    divergence = functools.partial(F.kl_div, log_target=True, reduction="none")
    if kind == "forward_kl":
        return divergence(student, teacher).sum(-1)
    if kind == "reverse_kl":
        return divergence(teacher, student).sum(-1)
    middle = torch.logaddexp(student, teacher) - torch.log(student.new_tensor(2.0))
    return (divergence(middle, student) + divergence(middle, teacher)).sum(-1) / 2


def _detached(found: dict[str, Tensor], leaves: Named) -> Named:
    gradients = {f"d {key}": one.grad for key, one in leaves.items() if one.grad is not None}
    return {key: one.detach() for key, one in (found | gradients).items()}
