# SPDX-License-Identifier: Apache-2.0
"""Flattened tiles for a while, in this process."""

import pytest

from fastpref.bench import flattened
from fastpref.bench.lanes import ON_CUDA
from fastpref.kernels import tiles


def flags(key: int) -> dict[int, bool]:
    return {size: pair.ordinary.flatten for size, pair in tiles.CHIPS[key].heavy.items()}


def test_while_the_context_lasts() -> None:
    before = dict(tiles.CHIPS)
    with pytest.raises(KeyError), flattened.with_flattened_tiles():
        # Of 16-bit inputs, where copies by descriptor pass beside an epilogue.
        assert flags(90) == {2: True, 4: False}
        assert not any(flags(80).values()) and not any(flags(100).values())
        assert not tiles.CHIPS[90].plain[2].flagged.flatten
        raise KeyError
    assert before == tiles.CHIPS and flags(90) == {2: False, 4: False}


def test_the_two_lanes() -> None:
    assert [lane.flatten for lane in ON_CUDA if lane.backend == "triton"] == [False, True]


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0), (13, 0)])
def test_nothing_is_measured_twice(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr("fastpref.bench.lanes.why_not", lambda backend, device: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    found = {lane.name: lane.unavailable("cuda") for lane in ON_CUDA}
    assert found.pop("fused, flattened") == (
        "its tiles are not flattened on compute capability {}.{}".format(*capability)
    )
    assert set(found.values()) == {None}


def test_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpref.bench.lanes.why_not", lambda backend, device: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert not any(lane.unavailable("cuda") for lane in ON_CUDA)
