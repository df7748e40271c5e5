# SPDX-License-Identifier: Apache-2.0
"""Rows and batches scored by one compiled operator: the bits of the steps that it joins."""

import pytest
import torch

from fastpref.scoring.statistics import RowSums
from tests.scoring.cases import BACKENDS, DTYPES
from tests.scoring.operator_calls import (
    INF,
    exact_of,
    outputs_and_tile,
    places_of,
    same_bits,
    score_rows_arguments,
)

pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="the operators are not built")
ops = torch.ops.fastpref
LOGP = 5  # of the numbers without statistics


def score_in_steps(tile, hidden, weight, target, bias, scale, cap, write, statistics):
    """What ``score_rows_`` does, by the three operators that it joins."""
    column, raw, logit = ops.target_logits(hidden, weight, target, bias, scale, cap)
    sums, best_index = ops.exp_rows_(tile, column, logit, bias, scale, cap, None, write, statistics)
    own = RowSums.of(sums, best_index if statistics else None)
    given = own.anchor, own.sum, own.offset, own.best, column, raw, logit
    scores = ops.settle_rows_(tile if write else None, *given, scale, cap)
    return torch.cat([raw[None], logit[None], sums, scores]), best_index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map", [(1.0, 0.0), (0.7, 0.0), (1.3, 20.0)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
def test_rows_are_scored_as_in_steps(dtype, map, biased, write, statistics):
    """Targets of other ranks and of none, a column that rises above its anchor, and rows that are
    lost to NaN among them; the matrices begin at any address."""
    rows, cols = 61, 1031
    hidden = torch.randn(rows, 30)[:, 1:24].to(dtype)
    weight = torch.randn(cols, 29).to(dtype)[:, 3:26]
    tile = (hidden.double() @ weight.double().t()).to(dtype)
    tile[7, 600], tile[8] = 400, -300
    tile[9, 3], tile[10, 4], tile[11] = torch.nan, INF, -INF
    target = torch.randint(0, cols, (rows,))
    target[:5] = torch.tensor([-1, cols, 10**12, -100, cols - 1])
    arguments = score_rows_arguments(
        tile=tile,
        hidden=hidden,
        weight=weight,
        target=target,
        bias=torch.randn(cols, dtype=exact_of(dtype)) if biased else None,
        scale=map[0],
        cap=map[1],
        write=write,
        statistics=statistics,
    )
    found = outputs_and_tile(ops.score_rows_, arguments)
    expected = outputs_and_tile(score_in_steps, arguments)
    for one, other in zip(found, expected, strict=True):
        same_bits(one, other)
    if not write:
        same_bits(found[2], tile)


@pytest.mark.parametrize("rows, cols, width", [(0, 5, 8), (1, 1, 1), (3, 2, 0), (70, 3001, 9)])
def test_rows_are_scored_alike_at_any_size(rows, cols, width):
    """And nothing beside a tile that is a slice of a wider one is touched."""
    wide = torch.randn(rows, cols + 20)
    hidden, weight = torch.randn(rows, width), torch.randn(cols, width)
    arguments = score_rows_arguments(rows, cols, hidden=hidden, weight=weight)
    arguments["tile"] = wide[:, 7 : 7 + cols].contiguous()
    expected = outputs_and_tile(score_in_steps, arguments)
    before = wide.clone()
    inside = wide[:, 7 : 7 + cols]
    found = *ops.score_rows_(**{**arguments, "tile": inside}), inside
    for one, other in zip(found, expected, strict=True):
        same_bits(one, other.contiguous())
    same_bits(wide[:, :7], before[:, :7])
    same_bits(wide[:, 7 + cols :], before[:, 7 + cols :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map", [(1.0, 0.0), (1.3, 20.0)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("rows, total", [(61, 61), (61, 200), (1, 9), (0, 9)])
def test_a_batch_is_scored_as_its_rows(dtype, map, biased, write, rows, total):
    """And elsewhere in the batch lies 0."""
    cols = 1031
    places = None if rows == total else places_of(total, rows)
    target = torch.randint(0, cols, (total,))
    target[3] = cols + 5
    own = target if places is None else target[places]
    arguments = score_rows_arguments(
        rows,
        cols,
        dtype,
        target=own,
        bias=torch.randn(cols, dtype=exact_of(dtype)) if biased else None,
        scale=map[0],
        cap=map[1],
        write=write,
        statistics=False,
    )
    numbers, _, exps = outputs_and_tile(ops.score_rows_, arguments)
    expected = torch.zeros(total, dtype=exact_of(dtype))
    if places is None:
        expected = numbers[LOGP].clone()
    else:
        expected[places] = numbers[LOGP]
    del arguments["statistics"]
    found = outputs_and_tile(ops.score_batch_, {**arguments, "target": target, "places": places})
    for one, other in zip(found, (expected, numbers, exps), strict=True):
        same_bits(one, other)
    assert found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()
    if total % 4 == 0:
        given = {**arguments, "target": target.view(4, -1), "places": places}
        same_bits(outputs_and_tile(ops.score_batch_, given)[0], expected.view(4, -1))
