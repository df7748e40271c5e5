# SPDX-License-Identifier: Apache-2.0
"""What a loss returns: six fields, and beside them which rows are chosen."""

import copy
import pickle

import pytest
import torch

from fastpref.units import PreferenceOutput
from fastpref.units.layouts import Interleaved, Units


def output(arrangement=None, **changes) -> PreferenceOutput:
    fields = {
        "loss": torch.tensor(0.5),
        "losses": torch.rand(2),
        "rewards": torch.rand(4),
        "logps": -torch.rand(4),
        "ref_logps": None,
        "metrics": {"rewards/chosen": torch.tensor(1.0)},
    }
    return PreferenceOutput(**(fields | changes), arrangement=arrangement)


def test_six_fields() -> None:
    given = output(Interleaved())
    assert isinstance(given, tuple) and len(given) == 6
    assert given._fields == ("loss", "losses", "rewards", "logps", "ref_logps", "metrics")
    for got, name in zip(given, given._fields, strict=True):
        assert got is getattr(given, name) is given[given._fields.index(name)]
    assert PreferenceOutput(*given)[:] == given[:]


@pytest.mark.parametrize(
    "again",
    [
        lambda one: one._replace(loss=2 * one.loss),
        copy.copy,
        copy.deepcopy,
        lambda one: pickle.loads(pickle.dumps(one)),
    ],
    ids=["replaced", "copied", "copied deeply", "pickled"],
)
def test_the_layout_stays(again) -> None:
    given = output(Interleaved())
    found = again(given)
    assert type(found) is PreferenceOutput
    assert torch.equal(found.chosen_logps, given.logps[0::2])
    assert torch.equal(found.rejected_logps, given.logps[1::2])
    assert torch.equal(found.chosen_rewards, given.rewards[0::2])
    assert torch.equal(found.rejected_rewards, given.rewards[1::2])


def test_what_has_no_sides_says_so() -> None:
    for rebuilt in (PreferenceOutput(*output(Interleaved())), PreferenceOutput._make(output())):
        with pytest.raises(AttributeError, match="rebuilt from its fields"):
            _ = rebuilt.chosen_logps
    with pytest.raises(AttributeError, match="of a pairwise objective"):
        _ = output(Units()).rejected_rewards
