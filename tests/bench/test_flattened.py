# SPDX-License-Identifier: Apache-2.0
"""Flattened tiles for a while, in this process."""

import dataclasses

import pytest

from fastpref.bench import flattened
from fastpref.bench.lanes import ON_CUDA
from fastpref.kernels import tiles

flatten = dataclasses.make_dataclass(
    "flatten", [("flatten", bool, False)], bases=(tiles.TileShape,), frozen=True
)


@pytest.fixture
def with_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles whose shapes have the field."""

    def widened(table: dict[int, tiles.Tiles]) -> dict[int, tiles.Tiles]:
        return {
            size: dataclasses.replace(pair, ordinary=flatten(**vars(pair.ordinary)))
            for size, pair in table.items()
        }

    chips = {
        key: dataclasses.replace(chip, plain=widened(chip.plain), heavy=widened(chip.heavy))
        for key, chip in tiles.CHIPS.items()
    }
    monkeypatch.setattr(tiles, "CHIPS", chips)
    monkeypatch.setattr(tiles, "TileShape", flatten)


def flags(key: int) -> dict[int, bool]:
    return {size: pair.ordinary.flatten for size, pair in tiles.CHIPS[key].heavy.items()}


@pytest.mark.usefixtures("with_field")
def test_while_the_context_lasts() -> None:
    assert flattened.unavailable() is None
    with pytest.raises(KeyError), flattened.with_flattened_tiles():
        # Of 16-bit inputs, where copies by descriptor pass beside an epilogue.
        assert flags(90) == {2: True, 4: False} and flags(80) == {2: False, 4: False}
        assert not tiles.CHIPS[90].plain[2].flagged == tiles.CHIPS[90].plain[2].ordinary
        with flattened.with_flattened_tiles(False):
            assert flags(90) == {2: False, 4: False}
        assert flags(90)[2]
        raise KeyError
    assert flags(90) == {2: False, 4: False}


@pytest.mark.skipif(flattened.unavailable() is None, reason="these tiles have the field")
def test_without_the_field_the_candidate_is_unavailable() -> None:
    before = dict(tiles.CHIPS)
    with flattened.with_flattened_tiles():
        assert tiles.CHIPS == before
    assert "no flattening" in str(flattened.unavailable())


def test_the_two_lanes() -> None:
    assert [lane.flatten for lane in ON_CUDA if lane.backend == "triton"] == [False, True]
