# SPDX-License-Identifier: Apache-2.0
"""Growth curves: their shapes, exponents and table."""

from __future__ import annotations

from typing import Any

import pytest

from fastpref.bench import scaling


def test_one_size_changes_at_a_time() -> None:
    for axis, name in (("N", "scored"), ("V", "vocab_size"), ("H", "hidden_size")):
        for size in scaling.AXES[axis]:
            shape = scaling.shape_at(axis, size)
            assert getattr(shape, name) == size
            others = {"scored", "vocab_size", "hidden_size"} - {name}
            assert all(getattr(shape, one) == getattr(scaling.BASE, one) for one in others)


def rows(power: float) -> list[dict[str, Any]]:
    return [
        {"size": size, "seconds": size**power, "products": size / 2, "workspace": 7.0}
        for size in (1, 2, 8)
    ]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponent(power: float) -> None:
    assert scaling.exponent(rows(power), "seconds") == pytest.approx(power)


def test_table() -> None:
    said = scaling.table("N", rows(1.0)).splitlines()
    assert "growth exponents in N: seconds 1.00, products 1.00" in said[-1]
    assert len(said) == 5 and "2.00x" in said[1] and "7 MiB" in said[1]


def test_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BASE", scaling.Shape(4, 16, 8, 50))
    monkeypatch.setattr(scaling, "measure", lambda *_: {"peak": 5.0, "gradients": 2.0})
    found = scaling.curve("N", 1, lambda text: None, (16, 32))
    assert [row["size"] for row in found] == [16, 32]
    assert all(row["seconds"] > 0 and row["workspace"] == 3.0 for row in found)
