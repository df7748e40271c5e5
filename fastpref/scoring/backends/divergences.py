# SPDX-License-Identifier: Apache-2.0
"""Divergences of two rows of raw products, with their gradients in closed form: in plain torch, in
the compiled operator (csrc/cpu/divergence_rows.inl), or in a Triton kernel.

With logits s of the student and t of the teacher, q = softmax(s), p = softmax(t):

    forward_kl     D = sum p log(p / q)
                   dD/ds = q - p
    reverse_kl     D = sum q log(q / p)
                   dD/ds = q (log(q / p) - D)
    jsd            D = beta sum p log(p / m) + (1 - beta) sum q log(q / m), m = (1-beta) q + beta p
                   dD/ds = (1 - beta) q (log(q / m) - sum q log(q / m))
    tv             D = sum |p - q| / 2
                   dD/ds = q (h - sum q h), h = sign(q - p) / 2
    bhattacharyya  D = -log b, b = sum sqrt(p q)
                   dD/ds = (q - sqrt(p q) / b) / 2
    cosine         D = 1 - c, c = s . t / (|s| |t|)
                   dD/ds = c s / |s|^2 - t / (|s| |t|)

A column without weight counts nothing: 0 log 0 is 0.

These sums cancel where q is close to p, and the gradients where q is all but 1 somewhere. The
kernels sum other terms (csrc/cpu/divergence_rows.inl); plain torch computes in float64 instead,
unless the products were rounded to 16 bits before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..types import LogitMap, statistics_dtype

# Elements of one temporary. Launches are what costs on a GPU.
_BLOCK_CPU = 1 << 20
_BLOCK_ELSEWHERE = 1 << 25
_TEMPORARIES = 12  # of a block, alive at once


def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` has no divergences, or None when it has."""
    if backend == "cuda":
        return "the cuda backend has no divergences; use backend='auto' or 'torch'"
    return None


def temporary_bytes(
    rows: int, cols: int, device_type: str, dtype: torch.dtype, backend: str
) -> int:
    """Most memory that a pass over two (rows, cols) tiles takes beside them."""
    if _in_registers(backend, dtype):
        return 0
    block = max(cols, min(rows * cols, _block_elements(device_type)))
    return _TEMPORARIES * block * _formula_dtype(dtype).itemsize


def _in_registers(backend: str, dtype: torch.dtype) -> bool:
    """Whether a kernel keeps what lies between tile and result."""
    return backend == "cpp" or (backend in ("triton", "rows") and dtype != torch.float64)


def _block_elements(device_type: str) -> int:
    return _BLOCK_CPU if device_type == "cpu" else _BLOCK_ELSEWHERE


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    map: LogitMap,
    divergence: str,
    beta: float,
    write: bool,
    backend: str,
) -> Tensor:
    """(rows,) in the statistics' dtype; with ``write`` the student's tile becomes dD / d(raw
    product)."""
    if _in_registers(backend, student.dtype):
        tiles, kind = (student, teacher, student_bias, teacher_bias), KINDS.index(divergence)
        if backend == "cpp":
            value: Tensor = torch.ops.fastpref.divergence_rows_(*tiles, *map, kind, beta, write)
            return value
        from . import divergence_launch

        if divergence_launch.serves(backend, *tiles, map, kind, write):
            return divergence_launch.divergence_rows(*tiles, map, kind, beta, write)
    return formula_rows(student, teacher, student_bias, teacher_bias, map, divergence, beta, write)


def formula_rows(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    map: LogitMap,
    divergence: str,
    beta: float,
    write: bool,
) -> Tensor:
    """As ``divergence_rows``, in plain torch."""
    formula = FORMULAS[divergence]
    values = [student.new_empty(0, dtype=statistics_dtype(student.dtype))]
    for rows, own, other in logit_blocks(student, teacher, student_bias, teacher_bias, map):
        wide = _formula_dtype(student.dtype)
        value, gradient = formula(own.to(wide), other.to(wide), beta)
        if write:
            tile = student[rows]
            tile.copy_(gradient * map.slope(_raw(tile, student_bias)) * map.scale)
        values.append(value.to(values[0].dtype))
    return torch.cat(values)


def logit_blocks(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    map: LogitMap,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of two tiles of raw products, and their logits in the statistics' dtype, a few at a
    time."""
    total, cols = student.shape
    step = max(1, _block_elements(student.device.type) // max(1, cols))
    for start in range(0, total, step):
        rows = slice(start, min(total, start + step))
        own, other = _raw(student[rows], student_bias), _raw(teacher[rows], teacher_bias)
        yield rows, map.logit(own), map.logit(other)


def _formula_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def _raw(tile: Tensor, bias: Tensor | None) -> Tensor:
    raw = tile.to(statistics_dtype(tile.dtype))
    return raw if bias is None else raw + bias


def _forward_kl(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_q, log_p = s.log_softmax(1), t.log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    return _mean_of(p, log_p - log_q), q - p


def _reverse_kl(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_q, log_p = s.log_softmax(1), t.log_softmax(1)
    q, ratio = log_q.exp(), log_q - log_p
    value = _mean_of(q, ratio)
    return value, torch.where(q > 0, q * (ratio - value[:, None]), 0)


def _jsd(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_q, log_p = s.log_softmax(1), t.log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    # The log of (1 - beta) q + beta p, which may underflow where one of the two does not.
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    own = _mean_of(q, log_q - log_m)
    value = beta * _mean_of(p, log_p - log_m) + (1 - beta) * own
    return value, torch.where(q > 0, (1 - beta) * q * (log_q - log_m - own[:, None]), 0)


def _tv(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    q = s.softmax(1)
    difference = q - t.softmax(1)
    half = difference.sign() / 2
    return difference.abs().sum(1) / 2, q * (half - (q * half).sum(1, keepdim=True))


def _bhattacharyya(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_q, log_p = s.log_softmax(1), t.log_softmax(1)
    # Not from exp(middle), which may underflow everywhere.
    middle = (log_q + log_p) / 2
    return -middle.logsumexp(1), (log_q.exp() - middle.softmax(1)) / 2


def _cosine(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(s.dtype).tiny
    length = s.norm(dim=1, keepdim=True).clamp(min=tiny)
    s, t = s / length, t / t.norm(dim=1, keepdim=True).clamp(min=tiny)
    cosine = (s * t).sum(1, keepdim=True)
    return 1 - cosine[:, 0], (cosine * s - t) / length


def _mean_of(weights: Tensor, values: Tensor) -> Tensor:
    """sum of weights times values, where there is weight."""
    return torch.where(weights > 0, weights * values, 0).sum(1)


# In the order of the compiled operator's kinds.
FORMULAS: Mapping[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tv": _tv,
    "bhattacharyya": _bhattacharyya,
    "cosine": _cosine,
}
KINDS = tuple(FORMULAS)
