# SPDX-License-Identifier: Apache-2.0
"""The example's tools find out what its data were made with."""

import re

import pytest

from tests.examples.loading import load


@pytest.mark.heavy
def test_each_tool_finds_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    load("choosing_pairs").main()
    lines = capsys.readouterr().out.splitlines()
    found = {
        re.split(r"\s{2,}", one)[0]: [float(n) for n in re.findall(r"-?\d+\.?\d*", one)]
        for one in lines
    }
    everything, kept, count = found["clear margin"]
    assert kept > everything + 0.05 and 50 < count < 350
    hard, easy = found["margin weights"]
    assert hard > 1 > easy
    assert all(0.4 < one < 0.6 for one in found["one model"])
    assert min(found["two models"]) > 0.95
    assert found["ridge probe"][0] > 0.9
    assert found["mixture"][0] < 0.01
    pairs, node, best = found["tree"]
    assert pairs == 7 and node == best
    like, unlike, weights = found["step rewards"]
    assert (like, unlike, weights) == pytest.approx((2, 0, 0), abs=1e-3)
