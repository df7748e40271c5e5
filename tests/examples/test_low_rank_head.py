# SPDX-License-Identifier: Apache-2.0
"""The example's low-rank head learns what the dense one does, at fewer products."""

import pytest

from tests.examples.loading import load


@pytest.mark.heavy
def test_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("low_rank_head")
    dense, low = example.trained(None), example.trained(example.RANK)
    # In 40 steps at the same rate, on a quarter of the columns.
    assert dense[-1] < 0.5 * dense[0]
    assert low[0] - low[-1] > 0.7 * (dense[0] - dense[-1])
    said = capsys.readouterr().out
    assert "rank 64: 2.00 products" in said and "rank 16: 1.25 products" in said
