# SPDX-License-Identifier: Apache-2.0
"""Objectives by name: which can be trained with, and what they need of the data."""

from pathlib import Path
from typing import Annotated

import pytest
from torch import Tensor

from fastpref import objectives
from fastpref.demo import DemoError
from fastpref.demo.objective import LOSS_TYPES, choices, columns, config_arguments, find
from fastpref.objectives.signature import ExtraFacts


def test_common_objectives_can_be_chosen():
    assert {"dpo", "ipo", "hinge", "simpo", "sft"} <= set(choices())
    assert all(find(name).name == name for name in choices())


def test_unknown_name_is_refused_with_the_valid_ones():
    with pytest.raises(DemoError) as caught:
        find("dpo2")
    message = str(caught.value)
    assert "--objective dpo2" in message and "dpo, " in message and "simpo" in message


@pytest.mark.parametrize("name", ["grpo", "dpo_shift", "tdpo", "alpha_dpo"])
def test_what_pairs_cannot_give_is_refused_with_the_reason(name):
    if name not in objectives.names():
        pytest.skip(f"{name} is not in the catalogue")
    with pytest.raises(DemoError, match="needs"):
        find(name)


def test_extras_that_the_batch_does_not_give_are_columns():
    def margin(chosen, rejected, *, reward_margin: Annotated[Tensor, ExtraFacts(aligned=True)]):
        return rejected - chosen + reward_margin

    assert columns(objectives.Objective(margin, unit="pair", scope="pair")) == ("reward_margin",)
    assert columns(objectives.get("simpo")) == columns(objectives.get("dpo")) == ()


def test_trl_gets_the_hyperparameters_of_the_objective():
    assert config_arguments(objectives.get("dpo", beta=0.3)) == {
        "loss_type": ["sigmoid"],
        "beta": 0.3,
        "label_smoothing": 0.0,
    }
    assert config_arguments(objectives.get("simpo")) == {}


def test_loss_types_are_those_of_trl():
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    text = Path(dpo_trainer.__file__).read_text(encoding="utf-8")
    assert all(f'"{loss_type}"' in text for loss_type in LOSS_TYPES.values())
