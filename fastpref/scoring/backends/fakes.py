# SPDX-License-Identifier: Apache-2.0
"""Shapes of the compiled operators' results, for tracing: registered where the library loads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._extension import fake_of
from ..statistics import SUMS, RowScores, summed
from ..types import statistics_dtype


@fake_of("fastpref::exp_rows_")
def _exp_rows(
    tile: Tensor,
    target: Tensor,
    anchor: Tensor,
    bias: Tensor | None,
    scale: float,
    cap: float,
    factor: Tensor | None,
    write: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    rows = anchor.shape[0]
    kinds = len(SUMS) + len(summed(statistics, cap != 0))
    return anchor.new_empty((kinds, rows)), target.new_empty((rows if statistics else 0,))


@fake_of("fastpref::logit_grad_")
def _logit_grad(
    tile: Tensor,
    target: Tensor,
    anchor: Tensor,
    norm: Tensor,
    logp: Tensor,
    grad_logp: Tensor,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    bias: Tensor | None,
    scale: float,
    cap: float,
    factor: Tensor | None,
) -> None:
    return None


@fake_of("fastpref::target_logits")
def _target_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, scale: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    raw = hidden.new_empty((hidden.shape[0],), dtype=statistics_dtype(hidden.dtype))
    return torch.empty_like(target), raw, torch.empty_like(raw)


@fake_of("fastpref::settle_rows_")
def _settle_rows(
    exps: Tensor | None,
    anchor: Tensor,
    sum: Tensor,
    offset: Tensor,
    best: Tensor | None,
    column: Tensor,
    raw: Tensor,
    logit: Tensor,
    scale: float,
    cap: float,
) -> Tensor:
    return anchor.new_empty((len(RowScores._fields) + 1, anchor.shape[0]))


@fake_of("fastpref::score_rows_")
def _score_rows(
    tile: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    cap: float,
    write: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    rows = tile.shape[0]
    sums = len(SUMS) + len(summed(statistics, cap != 0))
    kinds = 2 + sums + len(RowScores._fields) + 1
    numbers = tile.new_empty((kinds, rows), dtype=statistics_dtype(tile.dtype))
    return numbers, target.new_empty((rows if statistics else 0,))


@fake_of("fastpref::score_batch_")
def _score_batch(
    tile: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    places: Tensor | None,
    bias: Tensor | None,
    scale: float,
    cap: float,
    write: bool,
) -> tuple[Tensor, Tensor]:
    exact = statistics_dtype(tile.dtype)
    kinds = 2 + len(SUMS) + len(RowScores._fields) + 1
    logp = tile.new_empty(target.shape, dtype=exact)
    return logp, tile.new_empty((kinds, tile.shape[0]), dtype=exact)


@fake_of("fastpref::gradient_factors")
def _gradient_factors(gradient: Tensor, scale: Tensor, rate: float) -> Tensor:
    return torch.empty_like(gradient)


@fake_of("fastpref::spread_rows_")
def _spread_rows(out: Tensor, rows: Tensor, factor: Tensor, places: Tensor) -> None:
    return None


@fake_of("fastpref::scale_rows_")
def _scale_rows(out: Tensor, input: Tensor, factor: Tensor) -> None:
    return None


@fake_of("fastpref::divergence_rows_")
def _divergence_rows(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    scale: float,
    cap: float,
    factor: Tensor | None,
    kind: int,
    beta: float,
    write: bool,
) -> Tensor:
    return student.new_empty((student.shape[0],), dtype=statistics_dtype(student.dtype))
