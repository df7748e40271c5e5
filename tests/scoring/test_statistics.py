# SPDX-License-Identifier: Apache-2.0
"""The table of statistics, and those who index what it names."""

import re
from pathlib import Path

import pytest
import torch

from fastpref.scoring.statistics import STATISTICS, SUMS, RowSums, merge, summed

HEADER = Path(__file__).parents[2] / "csrc" / "cpu" / "row_kernels.h"
NAMES = [one.name for one in STATISTICS]


def test_every_statistic_is_a_field_and_those_of_a_cap_come_last():
    assert set(RowSums._fields) == {*SUMS, "best_index", *NAMES}
    capped = [one.capped for one in STATISTICS]
    assert capped == sorted(capped) and any(capped)
    assert summed(False, True) == () and summed(True, True) == STATISTICS
    assert [one.name for one in summed(True, False)] == NAMES[: capped.index(True)]


def test_the_compiled_kernels_have_the_same_order():
    (body,) = re.findall(r"enum RowSum : int \{([^}]*)\}", HEADER.read_text(encoding="utf-8"))
    entries = [entry.strip().split(" = ") for entry in body.split(",")]
    names = [name.removeprefix("k").lower() for name, *_ in entries]
    assert names == [*SUMS, "sums", *NAMES, "allsums"]
    # A number that is given is the one that the sums ended with.
    assert [value for value in entries if len(value) > 1] == [["kBest", "kSums"]]


def test_the_triton_kernels_have_the_same_order():
    kernels = pytest.importorskip("fastpref.kernels.statistics")
    found = {name: getattr(kernels, name.upper()).value for name in NAMES}
    assert found == {name: index for index, name in enumerate(NAMES)}


def test_parts_without_statistics_do_not_merge_with_those_that_have_some():
    plain = RowSums(*torch.randn(3, 4))
    whole = plain._replace(
        best_index=torch.zeros(4, dtype=torch.int64),
        **{name: torch.randn(4) for name in NAMES},
    )
    for parts in ([whole, plain], [whole, whole._replace(total=None)]):
        with pytest.raises(TypeError, match="all carry statistics"):
            merge(parts)
    assert merge([plain, plain]).best is None
    assert merge([whole._replace(total=None)] * 2).total is None


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_is_what_the_sum_over_all_columns_is(name):
    """Of three parts, each about an anchor of its own."""
    logits = torch.randn(3, 50, 7, dtype=torch.float64) * 4
    anchors = torch.randn(3, 50, dtype=torch.float64)

    def sums_of(t, anchor):
        e, best = (t - anchor[:, None]).exp(), t.amax(1)
        values = {
            "best": best,
            "weighted": (e * (t - best[:, None])).sum(1),
            "squares": e.square().sum(1),
            "total": t.sum(1),
        }
        return RowSums(anchor, e.sum(1), torch.zeros(50), best_index=t.argmax(1), **values)

    merged = merge([sums_of(*one) for one in zip(logits, anchors, strict=True)])
    whole = sums_of(torch.cat([*logits], 1), anchors.amax(0))
    torch.testing.assert_close(getattr(merged, name), getattr(whole, name))
