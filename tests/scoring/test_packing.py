# SPDX-License-Identifier: Apache-2.0
"""Packing scored rows and spreading results, exactly (CPU) and under a bound (as on CUDA)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref.scoring.packing import Packing, pack

NAN = float("nan")


def target_with(scored, total=6):
    target = torch.full((total,), -100)
    target[list(scored)] = 1
    return target


@pytest.mark.parametrize("scored", [(), (0,), (5,), (1, 2, 4), range(6)])
def test_exact(scored):
    packing = pack(target_with(scored).view(2, 3), -100, None)
    assert (packing.total, packing.scored) == (6, len(scored))
    rows = torch.randn(6, 4)
    rows[[i for i in range(6) if i not in scored]] = NAN
    gathered = packing.gather(rows)
    assert torch.equal(gathered, rows[list(scored)])
    spread = packing.spread(gathered)
    assert torch.equal(spread, rows.nan_to_num(0.0))
    bools = packing.spread(torch.ones(len(scored), dtype=torch.bool))
    assert bools.dtype == torch.bool
    assert bools.nonzero()[:, 0].tolist() == list(scored)


def test_all_scored_copies_nothing():
    packing = pack(target_with(range(6)), -100, None)
    assert packing.positions is None
    rows = torch.randn(6, 4)
    assert packing.gather(rows).data_ptr() == rows.data_ptr()


def test_a_bound_that_is_too_small():
    with pytest.raises(ValueError, match=r"max_scored.*max_scored=2 and 3 targets.*None"):
        pack(target_with((1, 2, 4)), -100, 2)
    assert pack(target_with((1, 2, 4)), -100, 3).scored == 3


def bounded(scored, bound, total=6):
    """What pack returns on CUDA with ``max_scored=bound``."""
    flags = target_with(scored, total) != -100
    index = torch.nonzero_static(flags, size=bound, fill_value=total)[:, 0]
    return Packing(total, bound, index, index < total, flags.sum() > bound)


@pytest.mark.parametrize("scored", [(), (0,), (5,), (1, 2, 4)])
@pytest.mark.parametrize("bound", [3, 5, 6])
def test_dead_rows(scored, bound):
    """They read nothing (not even the NaN of the last row) and write nothing."""
    packing = bounded(scored, bound)
    rows = torch.randn(6, 4)
    rows[[i for i in range(6) if i not in scored]] = NAN
    gathered = packing.gather(rows)
    assert gathered.shape == (bound, 4)
    assert torch.equal(gathered[: len(scored)], rows[list(scored)])
    assert (gathered[len(scored) :] == 0).all()
    gathered[len(scored) :] = NAN
    assert torch.equal(packing.spread(gathered), rows.nan_to_num(0.0))
    assert not packing.spread(torch.ones(bound, dtype=torch.bool))[
        [i for i in range(6) if i not in scored]
    ].any()


def test_more_rows_than_the_bound_are_nan():
    packing = bounded((1, 2, 4), 2)
    assert packing.spread(torch.ones(2)).isnan().all()


def test_masked_in_place():
    """No packing at all: rows are positions, some of them dead."""
    flags = target_with((1, 2, 4)) != -100
    packing = Packing(6, 6, None, flags, None)
    rows = torch.full((6, 4), NAN)
    rows[flags] = 2.0
    assert torch.equal(packing.gather(rows), rows.nan_to_num(0.0))
    assert torch.equal(packing.spread(rows), rows.nan_to_num(0.0))
    assert torch.equal(packing.gather(rows[:, 0]), rows[:, 0].nan_to_num(0.0))


class OneDevice(TorchDispatchMode):
    """Refuses operators on tensors of several devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        assert len({one.device for one in tensors}) <= 1, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
@pytest.mark.parametrize("positions", [False, True])
def test_nothing_comes_from_the_host(dtype, positions):
    """A zero that lies there is copied to the GPU, and the host waits for it."""
    valid = torch.ones(4, dtype=torch.bool, device="meta")
    index = torch.arange(4, device="meta") if positions else None
    packing = Packing(4, 4, index, valid, valid.any())
    with OneDevice():
        rows = packing.gather(torch.empty(4, 3, dtype=dtype, device="meta"))
        assert packing.spread(rows).dtype == dtype
