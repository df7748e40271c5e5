# SPDX-License-Identifier: Apache-2.0
"""The table that compares objectives."""

import pytest

pytest.importorskip("trl")

from fastpref.demo.variants import Outcome, table


def test_margin_is_what_the_gaps_have_grown_by():
    outcome = Outcome.of([1.0, -2.0, 0.5, 1.0], [2.0, -1.0, 4.5, 1.0], [0.7, 0.6], 3.0)
    assert outcome == Outcome(0.75, 1.5, [0.7, 0.6], 3.0)


def test_table_has_a_line_an_objective():
    outcomes = {
        "dpo": Outcome(0.75, 1.5, [0.7, 0.65, 0.6], 3.0),
        "apo_zero_unpaired": Outcome(1.0, -0.25, [0.5, 0.4], 12.34),
    }
    lines = table(0.5, outcomes)
    assert [line.split() for line in lines[2:]] == [
        ["dpo", "50.0%", "75.0%", "1.50", "0.7000", "0.6000", "3.0"],
        ["apo_zero_unpaired", "50.0%", "100.0%", "-0.25", "0.5000", "0.4000", "12.3"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1
