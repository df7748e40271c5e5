# SPDX-License-Identifier: Apache-2.0
"""The error of preference_loss against float64, next to that of plain torch at the same dtype."""

import pytest
import torch

from fastpref import ScoringOptions, preference_loss
from tests.preference.plain_pairs import T, V, batch, found, plain
from tests.scoring.cases import check_contract

OPTIONS = {
    "kept": {},
    "recomputed": {"schedule": "recompute"},
    "batches": {"schedule": "batches", "memory_budget": 3 * T * V * 4},
    "least": {"schedule": "batches", "memory_budget": 1},
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Float16 waits for a loss scaler and takes no batches.
CASES = [
    (dtype, name)
    for dtype in DTYPES
    for name, options in OPTIONS.items()
    if dtype != torch.float16 or options.get("schedule") != "batches"
]


@pytest.mark.parametrize("dtype, options", CASES, ids=str)
@pytest.mark.parametrize("objective", ["dpo", "apo_zero"])
@pytest.mark.parametrize("upstream", [1.0, -3.7])
def test_error(dtype: torch.dtype, options: str, objective: str, upstream: float) -> None:
    given = batch(dtype)
    exact = {name: one.double() if one.is_floating_point() else one for name, one in given.items()}
    for one in (given, exact):
        one["hidden"].requires_grad_()
        one["weight"].requires_grad_()
    output = preference_loss(
        **given, objective=objective, options=ScoringOptions(**OPTIONS[options])
    )
    check_contract(
        found(output.loss, output.logps, given, upstream),
        found(*plain(given, objective), given, upstream),
        found(*plain(exact, objective), exact, upstream),
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_bits_are_the_same_every_time(options: str) -> None:
    given = batch(torch.float32)
    given["hidden"].requires_grad_()
    given["weight"].requires_grad_()
    runs = []
    for _ in range(2):
        chosen = ScoringOptions(**OPTIONS[options])
        output = preference_loss(**given, objective="dpo", options=chosen)
        runs.append(found(output.loss, output.logps, given, 1.0))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
