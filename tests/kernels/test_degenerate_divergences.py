# SPDX-License-Identifier: Apache-2.0
"""Divergences of degenerate rows: finite where mathematics is, and alike on every backend."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, linear_divergence
from tests.kernels.degenerate import AVAILABLE, DTYPES, INF, only, tolerance, whole
from tests.scoring.divergences import DIVERGENCES

BETA = 0.25
ROWS, H, V = 3, 8, 40


def pair(
    student: Tensor | None = None,
    teacher: Tensor | None = None,
    weight: Tensor | None = None,
    other: Tensor | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    **map,
):
    weight = whole(V, H, seed=3) if weight is None else weight
    return {
        "student_hidden": whole(ROWS, H, seed=1) if student is None else student,
        "teacher_hidden": whole(ROWS, H, seed=2) if teacher is None else teacher,
        "student_weight": weight,
        "teacher_weight": whole(V, H, seed=4) if other is None else other,
        "student_bias": biases[0],
        "teacher_bias": biases[1],
        **map,
    }


ZEROS, ONES = torch.zeros(ROWS, H).double(), torch.ones(V, H).double()
SAME = {"teacher": whole(ROWS, H, seed=1), "other": whole(V, H, seed=3)}
CASES = {
    "ordinary": pair(),
    "student of zeros": pair(student=ZEROS),
    "teacher of zeros": pair(teacher=ZEROS),
    "both of zeros": pair(student=ZEROS, teacher=ZEROS),
    "student of equal logits": pair(weight=ONES),
    "teacher of equal logits": pair(other=ONES),
    "both of equal logits": pair(weight=ONES, other=ONES),
    "one column": pair(weight=whole(1, H, seed=3), other=whole(1, H, seed=4)),
    "two columns": pair(weight=whole(2, H, seed=3), other=whole(2, H, seed=4)),
    "identical": pair(**SAME),
    "opposite": pair(**SAME, weight=-whole(V, H, seed=3)),
    "both all but one excluded": pair(biases=(only([5]), only([5]))),
    "both all but another excluded": pair(biases=(only([5]), only([6]))),
    "student all but one excluded": pair(biases=(only([5]), None)),
    "teacher all but one excluded": pair(biases=(None, only([5]))),
    "both some excluded": pair(biases=(only([*range(5, 30)]), only([*range(5, 30)]))),
    "both some excluded, zeros": pair(student=ZEROS, biases=(only([5, 6, 9]), only([5, 6, 9]))),
    "both some excluded, identical": pair(**SAME, biases=(only([5, 6, 9]), only([5, 6, 9]))),
    "both some excluded, cap": pair(
        biases=(only([*range(5, 30)]), only([*range(5, 30)])), softcap=4.0
    ),
    "huge": pair(logit_scale=2.0**12),
    "huge, identical": pair(**SAME, logit_scale=2.0**12),
    "huger": pair(logit_scale=2.0**40),
    "huger, cap": pair(logit_scale=2.0**40, softcap=4.0),
    "tiny": pair(logit_scale=2.0**-20),
    "tinier": pair(logit_scale=2.0**-45),
    "huge student": pair(student=64 * whole(ROWS, H, seed=1)),
    "huge teacher": pair(teacher=64 * whole(ROWS, H, seed=2)),
}


def logits(case, model: str) -> Tensor:
    z = case[f"{model}_hidden"] @ case[f"{model}_weight"].t()
    bias, cap = case[f"{model}_bias"], case.get("softcap")
    z = (z if bias is None else z + bias) * case.get("logit_scale", 1.0)
    return z if cap is None else cap * torch.tanh(z / cap)


def slope(case) -> Tensor:
    """Of the student's logits at its products."""
    scale, cap = case.get("logit_scale", 1.0), case.get("softcap")
    ones = torch.full((ROWS, case["student_weight"].shape[0]), scale).double()
    return ones if cap is None else ones * (1 - (logits(case, "student") / cap).square())


def times(p: Tensor, log: Tensor) -> Tensor:
    """p log, 0 where p is."""
    return torch.where(p > 0, p * torch.where(p > 0, log, 0.0), 0.0)


def cosine(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of a row of zeros the distance is 1, without gradient."""
    excluded = (s == -INF) & (t == -INF)
    s, t = s.masked_fill(excluded, 0), t.masked_fill(excluded, 0)
    # Lengths of huge logits overflow no less than their products.
    lengths = [one.norm(dim=1, keepdim=True) for one in (s, t)]
    zero = (lengths[0] == 0) | (lengths[1] == 0)
    u, w = (one / torch.where(zero, 1, length) for one, length in zip((s, t), lengths, strict=True))
    value = torch.where(zero[:, 0], 1.0, (u - w).square().sum(1) / 2)
    gradient = (u - w - value[:, None] * u) / torch.where(zero, 1, lengths[0])
    return value, torch.where(zero, 0.0, gradient)


def value_and_slope(s: Tensor, t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The divergence of rows of logits, and its gradient at the student's, in float64."""
    if kind == "cosine":
        return cosine(s, t)
    log_q, log_p = s.log_softmax(1), t.log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        return times(p, log_p - log_q).sum(1), q - p
    if kind == "reverse_kl":
        value = times(q, log_q - log_p).sum(1)
        return value, times(q, log_q - log_p) - q * value[:, None]
    if kind == "jsd":
        log_m = torch.logaddexp(
            log_q + torch.tensor(1 - BETA).double().log(), log_p + torch.tensor(BETA).double().log()
        )
        of_q = times(q, log_q - log_m).sum(1)
        value = BETA * times(p, log_p - log_m).sum(1) + (1 - BETA) * of_q
        return value, (1 - BETA) * (times(q, log_q - log_m) - q * of_q[:, None])
    if kind == "tv":
        sign = (q - p).sign() / 2
        return (q - p).abs().sum(1) / 2, q * (sign - (q * sign).sum(1, keepdim=True))
    log_b = ((log_p + log_q) / 2).logsumexp(1)
    r = torch.where(log_b[:, None] == -INF, 0.0, ((log_p + log_q) / 2 - log_b[:, None]).exp())
    return -log_b, (q - r) / 2


@functools.cache
def expected(name: str, kind: str) -> dict[str, Tensor]:
    case = CASES[name]
    value, gradient = value_and_slope(logits(case, "student"), logits(case, "teacher"), kind)
    d = torch.where(gradient == 0, 0.0, gradient * slope(case))
    return {
        "value": value,
        "d student_hidden": d @ case["student_weight"],
        "d student_weight": d.t() @ case["student_hidden"],
        "d student_bias": d.sum(0),
    }


def found(name: str, kind: str, backend: str, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    case = {
        key: one.to(dtype) if isinstance(one, Tensor) else one for key, one in CASES[name].items()
    }
    leaves = {}
    for key in ("student_hidden", "student_weight", "student_bias"):
        if case[key] is not None:
            leaves[key] = case[key] = case[key].clone().requires_grad_()
    options = ScoringOptions(backend=backend, **options)
    value = linear_divergence(**case, divergence=kind, beta=BETA, options=options)
    gradients = torch.autograd.grad(value.sum(), list(leaves.values()))
    named = zip((f"d {key}" for key in leaves), gradients, strict=True)
    return {"value": value.detach(), **dict(named)}


def sampled() -> Iterator[Any]:
    """Of interpreted backends, which share a kernel and take a second a case, a third of one."""
    for (i, name), (j, kind) in itertools.product(enumerate(CASES), enumerate(DIVERGENCES)):
        for backend in AVAILABLE:
            interpreted = backend in ("rows", "triton")
            slow = backend == "triton" or (interpreted and (i + j) % 3 != 0)
            marks = [pytest.mark.heavy] * interpreted + [pytest.mark.slow] * slow
            yield pytest.param(name, kind, backend, marks=marks)


@pytest.mark.parametrize("name, kind, backend", sampled())
def test_as_in_float64(name, kind, backend):
    problems, scale = [], CASES[name].get("logit_scale", 1.0)
    for dtype in DTYPES[backend]:
        for options in ({}, {"schedule": "recompute"}):
            actual = found(name, kind, backend, dtype, **options)
            for key, value in actual.items():
                right = expected(name, kind)[key]
                size = right[right.isfinite()].abs().max().item() if right.isfinite().any() else 0.0
                finite = right.isfinite() & (right.abs() <= torch.finfo(value.dtype).max / 4)
                if key.startswith("d ") and (name, kind) == ("tinier", "tv"):
                    # Signs of differences that rounding decides.
                    assert value.isfinite().all()
                    continue
                if key.startswith("d "):
                    if dtype == torch.float16 and scale > 2**10:
                        continue  # the gradients at the logits pass 65504
                    # Of sums that cancel, what is summed.
                    size = max(
                        size, scale * CASES[name]["student_hidden"].abs().max().item(), scale
                    )
                else:
                    size = max(size, 1.0)
                error = (value.double() - right)[finite].abs()
                undefined = key == "value" and not torch.equal(value.isnan(), right.isnan())
                if (
                    undefined
                    or not (error <= tolerance(dtype, size)).all()
                    or not torch.equal(value.double()[right.isinf()], right[right.isinf()])
                ):
                    problems.append(f"{dtype} {options} {key}: {value} instead of {right}")
    assert not problems, "\n".join(problems)
