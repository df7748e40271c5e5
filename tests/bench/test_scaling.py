# SPDX-License-Identifier: Apache-2.0
"""Growth curves: their shapes, exponents and points."""

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


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponent(power: float) -> None:
    rows = [{"size": size, "seconds": 3 * size**power} for size in (1, 2, 8)]
    assert scaling.exponent(rows, "seconds") == pytest.approx(power)


def test_point(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def memory(*given: Any) -> dict[str, float]:
        asked.extend(given)
        return {"peak": 5.0, "gradients": 2.0, "logits": 100.0}

    monkeypatch.setattr(scaling, "BASE", scaling.Shape(4, 16, 8, 50))
    monkeypatch.setattr(scaling.memory, "measure", memory)
    row = scaling.point("N", 32, 1, "cpu", lambda text: None)
    assert row["size"] == asked[0].shape.scored == 32
    assert asked[1:] == ["fastpref, recompute, 64 MiB", 64]
    assert row["seconds"] > 0 and row["products"] > 0 and row["workspace"] == 3.0
    assert row["rows"] == 16.0 and row["logits"] == 100.0
