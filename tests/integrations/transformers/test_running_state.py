# SPDX-License-Identifier: Apache-2.0
"""Running averages: those of the steps before, the same however a step is accumulated, saved and
restored to the bit."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref.integrations.transformers import loss_func
from tests.integrations.transformers.trainings import (
    make_model,
    make_rows,
    make_trainer,
)

MOVING = {"learning_rate": 0.05, "num_train_epochs": 3}


def moved(loss, rows, folder, resume=None, **arguments):
    """The weights after a training that moves them, and the running state."""
    trainer = make_trainer(loss, rows, folder, **{**MOVING, **arguments})
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat([one.detach().flatten() for one in trainer.model.parameters()])
    return weights, loss._state.state_dict(), trainer


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["bco", "alpha_dpo"])
@pytest.mark.parametrize("restored", [False, True])
def test_resumed_to_the_bit(name, restored, tmp_path):
    rows = make_rows("unit" if name == "bco" else "pair")
    arguments = {
        "gradient_accumulation_steps": 2,
        "restore_callback_states_from_checkpoint": restored,
    }
    whole, state, _ = moved(
        loss_func(name), rows, tmp_path, save_strategy="steps", save_steps=3, **arguments
    )
    again, resumed, _ = moved(
        loss_func(name), rows, tmp_path / "again", str(tmp_path / "checkpoint-3"), **arguments
    )
    assert all(one["updates"] == 6 for one in state.values())
    assert resumed == state
    assert torch.equal(whole, again)
    assert not torch.equal(whole, torch.cat([one.flatten() for one in make_model().parameters()]))
