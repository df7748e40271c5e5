# SPDX-License-Identifier: Apache-2.0
"""Which of a model's own programs and tests to trust."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives.checks import no_tensor


class MinimaxPairs(NamedTuple):
    """int64 indices, 0-dim or (...) of batches; all -1 where there is no pair.

    - ``best_row``: the program that passes most tests.
    - ``worst_row``: the one that passes fewest.
    - ``best_col``: of the tests that the best program passes, the most widely passed.
    - ``worst_col``: of those that the worst program fails, the least passed.
    """

    best_row: Tensor
    worst_row: Tensor
    best_col: Tensor
    worst_col: Tensor


def minimax_pairs(passes: Tensor) -> MinimaxPairs:
    """The program and test to prefer, and those to reject, by what the programs passed.

        best_row = the program that passes most tests, best_col = of these the most widely passed
        worst_row = the program that passes fewest, worst_col = of those it fails the least passed

    The selection of DSTC (Liu et al. 2024, arXiv:2411.13611): a program that is right passes many
    tests and a test that is right is passed by many programs, so that pairs stand even where single
    tests are wrong. Chosen and rejected response are each program and test, one after the other;
    training is any objective's (DPO, KTO), execution the caller's. Which test goes with the
    rejected program is a reading of the paper's account, not confirmed at the source.

    Args:
        passes: (..., programs, tests) bool or integer, nonzero = this program passes this test.

    Returns:
        ``(best_row, worst_row, best_col, worst_col)``; of equal counts the first. All are -1 where
        every program passes as many tests, which tells nothing apart.
    """
    if not isinstance(passes, Tensor):
        raise no_tensor("passes", passes)
    if passes.is_floating_point() or passes.is_complex():
        raise TypeError(f"passes must be bool or integer, got {passes.dtype}")
    if passes.dim() < 2 or 0 in passes.shape[-2:]:
        raise ValueError(f"passes must be (..., programs, tests), got {tuple(passes.shape)}")
    passed = (passes.detach() != 0).long()
    of_rows, of_cols = passed.sum(-1), passed.sum(-2)
    best_row, worst_row = _first(of_rows), _first(-of_rows)
    never = passed.shape[-2] + 1  # more than any count of programs
    of_best, of_worst = _row(passed, best_row), _row(passed, worst_row)
    best_col = _first(torch.where(of_best > 0, of_cols, -1))
    worst_col = _first(torch.where(of_worst > 0, -never, -of_cols))
    apart = of_rows.amax(-1) > of_rows.amin(-1)
    found = (best_row, worst_row, best_col, worst_col)
    return MinimaxPairs(*(torch.where(apart, one, -1) for one in found))


def _first(values: Tensor) -> Tensor:
    """Where the largest value of the last dimension first lies (argmax may return any)."""
    largest = values == values.amax(-1, keepdim=True)
    places = torch.arange(values.shape[-1], dtype=torch.int64, device=values.device)
    return torch.where(largest, places, values.shape[-1]).amin(-1)


def _row(matrix: Tensor, row: Tensor) -> Tensor:
    index = row[..., None, None].expand(*row.shape, 1, matrix.shape[-1])
    return matrix.gather(-2, index)[..., 0, :]
