# SPDX-License-Identifier: Apache-2.0
"""Objectives that torch.compile meets: some are kept, however many there are."""

import pytest
import torch
import torch.distributed as dist

from fastpref import objectives
from fastpref.units import configuration
from fastpref.units.configuration import configure


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Room for two."""
    torch._dynamo.reset()
    places = configuration.itertools.cycle(["objective_0", "objective_1"])
    monkeypatch.setattr(configuration, "_kept", configuration.SimpleNamespace())
    monkeypatch.setattr(configuration, "_places", places)


def loss(chosen, rejected, beta):
    objective = configure("cpo", None, {"beta": beta, "sft_weight": 0.0})
    return objective(chosen, rejected).losses.mean()


def test_no_more_are_kept_than_there_is_room_for() -> None:
    rows = torch.randn(2, 5)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    betas = (0.1, 0.2, 0.3, 0.1, 0.3, 0.2)
    for beta in betas:
        torch.testing.assert_close(compiled(*rows, beta), loss(*rows, beta))
    kept = vars(configuration._kept)
    assert len(kept) == 2
    assert {one.hyperparameters["beta"] for one in kept.values()} < set(betas)


def test_equal_ones_are_kept_once() -> None:
    rows = torch.randn(2, 5)
    for _ in range(3):
        torch._dynamo.reset()
        torch.compile(loss, fullgraph=True, backend="eager")(*rows, 0.1)
    assert len(vars(configuration._kept)) == 1


def test_the_room_there_is() -> None:
    assert configuration.MOST_KEPT == 64
    made = objectives.get("dpo", beta=0.3)
    assert configure(made, None, {}) == made and not vars(configuration._kept)


def test_two_groups_are_refused() -> None:
    one, other = dist.ProcessGroup(0, 1), dist.ProcessGroup(0, 1)
    objective = objectives.get("kto", dp_group=one)
    assert configure(objective, one, {}) == configure("kto", one, {}) == objective
    with pytest.raises(ValueError, match="dp_group is given twice: kto has another one"):
        configure(objective, other, {})
