# SPDX-License-Identifier: Apache-2.0
"""Objectives by name: which can be trained with, and what they need of the data."""

from typing import Annotated

import pytest
from torch import Tensor

from fastpref import objectives
from fastpref.demo import DemoError
from fastpref.demo.objective import (
    choices,
    columns,
    config_arguments,
    find,
    for_both_heads,
    trainer_name,
)
from fastpref.objectives.signature import Domain, ExtraFacts


def test_common_objectives_can_be_chosen():
    assert {"dpo", "ipo", "simpo", "madpo", "kto", "orpo", "cpo", "adpo"} <= set(choices())
    assert {"beta_dpo", "alpha_dpo", "bco"} <= set(choices())  # whose state the trainer keeps
    assert all(find(name).name == name for name in choices())


def test_unknown_name_is_refused_with_the_valid_ones():
    with pytest.raises(DemoError) as caught:
        find("dpo2")
    message = str(caught.value)
    assert "objective dpo2" in message and "dpo, " in message and "simpo" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("grpo", "needs sampled completions"),
        ("dpo_shift", "needs a value for shift"),
        ("tdpo", "needs chosen_kl and rejected_kl, which .*preference_loss, which fills them in"),
        ("mallows_po", "needs ref_entropy, which only fastpref.preference_loss fills in"),
        ("relative_po", "needs prompt_embeddings, which preference data does not have"),
    ],
)
def test_what_preferences_cannot_give_is_refused_with_the_reason(name, reason):
    with pytest.raises(DemoError, match=rf"objective {name}: {reason}.*\. Choose from .*dpo, "):
        find(name)


def test_extras_that_the_batch_does_not_give_are_columns():
    def margin(
        chosen, rejected, *, reward_margin: Annotated[Tensor, ExtraFacts(shapes=("logps",))]
    ):
        return rejected - chosen + reward_margin

    own = objectives.Objective(margin, unit="pair", scope="pair")
    assert columns(own) == {"reward_margin": Domain()}
    given = ("simpo", "dpo", "kto", "adpo", "nca", "rrhf", "rainbow_po")  # or optional
    assert columns(*map(objectives.get, given)) == {}
    probabilities = Domain(0.0, 1.0, includes=(0.0, 1.0))
    assert columns(objectives.get("soft_label_dpo")) == {"preference_probs": probabilities}


def test_columns_of_several_keep_the_narrower_domain():
    for names in [("madpo", "odpo"), ("odpo", "madpo")]:
        assert columns(*map(objectives.get, names)) == {"reward_margin": Domain(low=0.0)}


def test_trl_gets_the_hyperparameters_of_the_objective():
    assert config_arguments(objectives.get("dpo", beta=0.3)) == {
        "loss_type": ["sigmoid"],
        "beta": 0.3,
        "label_smoothing": 0.0,
    }
    assert config_arguments(objectives.get("simpo")) == {}
    assert config_arguments(objectives.get("kto")) == {}
    own = objectives.Objective(lambda chosen, rejected: chosen, unit="pair", scope="pair")
    assert config_arguments(own) == {}


@pytest.mark.parametrize(
    ("name", "trainer", "compared"),
    [
        ("dpo", "trl.DPOTrainer", "dpo"),
        ("hinge", "trl.DPOTrainer", "hinge"),
        ("beta_dpo", "fastpref.integrations.trl.FastDPOTrainer", "dpo"),
        ("kto", "fastpref.integrations.trl.FastDPOTrainer", "dpo"),
        ("adpo", "fastpref.integrations.trl.FastDPOTrainer", "dpo"),
    ],
)
def test_heads_are_compared_under_a_loss_of_trl(name, trainer, compared):
    objective = objectives.get(name)
    assert trainer_name(objective) == trainer
    assert for_both_heads(objective).name == compared
