# SPDX-License-Identifier: Apache-2.0
"""``trainer.evaluate()`` gives the loss of one whole batch, and rewards for ``compute_metrics``."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref.integrations.transformers import loss_func
from tests.integrations.transformers import plain_losses
from tests.integrations.transformers.trainings import (
    make_model,
    make_rows,
    make_trainer,
    plain_logps,
)

BETA = 0.3
NAMES = {"pair": "dpo", "list": "plackett_luce", "unit": "apo_zero_unpaired"}


@pytest.mark.heavy
@pytest.mark.parametrize("unit", NAMES)
def test_loss_and_rewards(unit, tmp_path):
    loss, rows, model = loss_func(NAMES[unit], beta=BETA), make_rows(unit), make_model()
    seen = {}

    def compute_metrics(prediction):
        seen["rewards"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"mean": float(prediction.predictions[prediction.predictions != -100].mean())}

    trainer = make_trainer(
        loss,
        rows,
        tmp_path,
        model=model,
        given={
            "eval_dataset": rows,
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": loss.rewards,
        },
    )
    metrics = trainer.evaluate()

    def scores(prompt, completion):
        return plain_logps(model, prompt, completion)

    with torch.no_grad():
        expected = float(getattr(plain_losses, NAMES[unit])(scores, rows, beta=BETA))
        rewards = [plain_losses.rewards(scores, row, beta=BETA) for row in rows]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    widest = max(map(len, rewards))
    filled = [row + [-100] * (widest - len(row)) for row in rewards]
    np.testing.assert_allclose(seen["rewards"], filled, rtol=1e-4, atol=1e-4)
    assert metrics["eval_mean"] == pytest.approx(float(np.mean(np.concatenate(rewards))), rel=1e-4)
    given = seen["labels"].numbers("ref_logps")
    assert given.dtype == np.float32 and given.shape == (len(rows), widest)


@pytest.mark.heavy
def test_loss_alone_in_training(tmp_path):
    """Evaluation in the middle of a training, by ``eval_strategy``."""
    rows = make_rows("pair")
    trainer = make_trainer(
        loss_func("dpo", beta=BETA),
        rows,
        tmp_path,
        given={"eval_dataset": rows[:5]},
        eval_strategy="epoch",
        gradient_accumulation_steps=3,
    )
    trainer.train()
    model = make_model()
    with torch.no_grad():
        expected = plain_losses.dpo(lambda *one: plain_logps(model, *one), rows[:5], beta=BETA)
    (found,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert found["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
