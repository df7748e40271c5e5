# SPDX-License-Identifier: Apache-2.0
"""Predictions of a call from counts, by hand."""

import pytest

from fastpref.bench import predictions
from fastpref.bench.predictions import CALLS, Call, Card, counts
from tests.bench.counted import COMPILED, LAUNCHED

CARD = Card("a card", 1e12, 1e11, 1e12)
KEPT = next(one for one in CALLS if one.name == "exponentials kept")


def test_kernels_of_a_call() -> None:
    assert Call("no gradient").kernels("bf16") == [
        *("target_logits", "exp_rows", "join_shares", "row_scores")
    ]
    assert KEPT.kernels("bf16") == [
        *("target_logits", "exp_rows write", "join_shares write", "row_scores store", "scale_rows")
    ]
    assert KEPT.passes("bf16") == ["exp_rows write"]
    assert KEPT.passes("fp16") == ["exp_rows", "join_shares write"]


def test_bytes_launches_and_seconds_add_up() -> None:
    found = counts(KEPT, "fp16", COMPILED, LAUNCHED)
    assert (found.read, found.written) == (4, 2)
    assert counts(KEPT, "fp32", COMPILED, LAUNCHED).read == 4
    assert (found.launches, found.forward_launches, found.triton_launches) == (20, 10, 6)
    assert found.compile_seconds == 2.5
    assert found.plain()["call"] == "exponentials kept"
    assert len(found.instructions) == 2
    recomputed = counts(CALLS[-1], "bf16", COMPILED, LAUNCHED)
    assert (recomputed.read, recomputed.written) == (4, 2)


@pytest.mark.parametrize("instructions, of_pass", [(20.0, 40e-12), (100.0, 100e-12)])
def test_a_pass_takes_its_bytes_or_its_instructions(instructions: float, of_pass: float) -> None:
    compiled = COMPILED | {
        "exp_rows write": COMPILED["exp_rows write"] | {"row_loop": instructions}
    }
    found = counts(KEPT, "bf16", compiled, LAUNCHED)
    head, rows = (64, 1000), predictions.ROWS
    bare = 3 * 2 * rows * 64 * 1000 / 1e12
    assert predictions.bare(CARD, head, 3) == pytest.approx(bare)
    expected = bare + rows * 1000 * of_pass + rows * 64 * 12 / 1e11 + 17 * 3e-6
    assert predictions.seconds(CARD, head, 3, found) == pytest.approx(expected)


def test_statistics_read_the_weight_once_more() -> None:
    plain, statistics = (counts(call, "bf16", COMPILED, LAUNCHED) for call in CALLS[:2])
    head, rows = (64, 1000), predictions.ROWS
    more = predictions.seconds(CARD, head, 1, statistics) - predictions.seconds(
        CARD, head, 1, plain
    )
    assert more == pytest.approx((2 * 64 * 1000 + 10 * rows * 64) / 1e11, rel=1e-6)


def test_beside_what_is_aimed_at() -> None:
    found = {call.name: counts(call, "bf16", COMPILED, LAUNCHED) for call in CALLS}
    rows = list(predictions.predicted(found))
    assert len(rows) == len(predictions.AIMS) * len(predictions.CARDS)
    for aim, card, milliseconds, times in rows:
        assert len(milliseconds) == len(predictions.HEADS)
        for ms, head in zip(milliseconds, predictions.HEADS, strict=True):
            assert ms > 1e3 * predictions.bare(card, head, aim.products)
        assert (times is None) == (aim.over_trl is None)
    # Four products and six bytes a logit, over the same in thousandths of a second.
    aim, card, milliseconds, times = next(row for row in rows if row[0].over_trl == 1.3)
    trl = 4 * 2 * 8192 * 4096 * 128256 / 700e12 + 8192 * 128256 * 6 / 3e12
    assert times == pytest.approx(1e3 * trl / milliseconds[0])
