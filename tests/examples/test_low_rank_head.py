# SPDX-License-Identifier: Apache-2.0
"""The example's low-rank head learns what the dense one does, at fewer products."""

import pytest

from tests.examples.loading import load


@pytest.mark.heavy
def test_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("low_rank_head")
    dense, low = example.trained(None), example.trained(example.RANK)
    assert low[-1] < 0.2 * low[0] and low[-1] < 2 * dense[-1] + 0.05
    said = capsys.readouterr().out
    assert "rank 64: 3.00 products" in said and "rank 16: 2.25 products" in said
