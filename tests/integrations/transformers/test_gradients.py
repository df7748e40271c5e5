# SPDX-License-Identifier: Apache-2.0
"""Each optimizer step of the Trainer has the loss and the gradient of one large batch in plain
torch, however it is accumulated, the uneven last step included."""

from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref.integrations.transformers import loss_func
from tests.integrations.transformers import plain_losses
from tests.integrations.transformers.trainings import check_step, make_rows, train

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("pair", {"beta": 0.3}),
    "simpo": ("pair", {"beta": 2.0, "gamma": 0.5}),
    "orpo": ("pair", {"beta": 0.4}),
    "odpo": ("pair", {"beta": 0.3, "alpha": 0.7}),  # with a column of its own
    "plackett_luce": ("list", {"beta": 0.2}),
}


@pytest.mark.heavy
@pytest.mark.parametrize("accumulated", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_as_one_large_batch(name, accumulated, tmp_path):
    unit, hyperparameters = CASES[name]
    rows = make_rows(unit)
    loss = loss_func(name, **hyperparameters)
    gradients, logged = train(loss, rows, tmp_path, gradient_accumulation_steps=accumulated)
    size = 2 * accumulated
    steps = [rows[start : start + size] for start in range(0, len(rows), size)]
    plain = getattr(plain_losses, name)
    for gradient, number, step in zip(gradients, logged, steps, strict=True):
        check_step(
            gradient, number, lambda scores, step=step: plain(scores, step, **hyperparameters)
        )
