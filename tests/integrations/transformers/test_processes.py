# SPDX-License-Identifier: Apache-2.0
"""Two processes: the same loss and gradient as one with the whole batch, uneven last batches
included."""

import tempfile

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref.integrations.transformers import loss_func
from tests.integrations.transformers.plain_losses import dpo, kto, plackett_luce, rewards
from tests.integrations.transformers.trainings import (
    check_step,
    make_model,
    make_rows,
    make_trainer,
    plain_logps,
    train,
)
from tests.ranks import started_by_torchrun

pytestmark = pytest.mark.heavy

# Ranks take what is left of the rows, and no row twice.
UNEVEN = {"even_batches": False}


def on_rank(rank, name, unit, accumulated, shared):
    """Gradients and logged losses of a training, and the running state it leaves."""
    with started_by_torchrun(rank, 2), tempfile.TemporaryDirectory() as folder:
        loss = loss_func(name, **({"dp_group": dist.group.WORLD} if shared else {}))
        gradients, logged = train(
            loss,
            make_rows(unit),
            folder,
            ddp_backend="gloo",
            accelerator_config=UNEVEN,
            gradient_accumulation_steps=accumulated,
        )
        assert dist.get_world_size() == 2
        return [one.tolist() for one in gradients], logged, loss._state.state_dict()


def evaluated_on_rank(rank, unit):
    """``eval_loss`` of lists or pairs two at a time on each rank, and the rewards."""
    with started_by_torchrun(rank, 2), tempfile.TemporaryDirectory() as folder:
        loss, seen = loss_func("dpo" if unit == "pair" else "plackett_luce"), []
        trainer = make_trainer(
            loss,
            make_rows(unit, 8),
            folder,
            ddp_backend="gloo",
            given={
                "eval_dataset": make_rows(unit, 8),
                "preprocess_logits_for_metrics": loss.rewards,
                "compute_metrics": lambda found: seen.append(found.predictions.tolist()) or {},
            },
        )
        return trainer.evaluate()["eval_loss"], seen[0]


def check(gradient, number, plain):
    check_step(torch.tensor(gradient, dtype=torch.float64), number, plain)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_dpo_as_one_large_batch(accumulated, two_ranks):
    rows = make_rows("pair")
    answers = two_ranks(on_rank, "dpo", "pair", accumulated, False)
    size = 4 * accumulated
    steps = [rows[start : start + size] for start in range(0, len(rows), size)]
    for gradients, logged, _ in answers:
        for gradient, number, step in zip(gradients, logged, steps, strict=True):
            check(gradient, number, lambda scores, step=step: dpo(scores, step, beta=0.1))


def test_kto_with_the_baseline_of_both(two_ranks):
    rows = make_rows("unit")
    for gradients, logged, _ in two_ranks(on_rank, "kto", "unit", 1, True):
        for gradient, number, step in zip(gradients, logged, [rows[:4], rows[4:]], strict=True):
            check(gradient, number, lambda scores, step=step: kto(scores, step, beta=0.1))


def test_running_state_of_both(two_ranks, tmp_path):
    loss = loss_func("alpha_dpo")
    train(loss, make_rows("pair"), tmp_path, gradient_accumulation_steps=2)
    expected = loss._state.state_dict()["gap"]
    (*_, first), (*_, second) = two_ranks(on_rank, "alpha_dpo", "pair", 1, False)
    assert first == second
    for name in ("mean", "std", "updates"):
        assert first["gap"][name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("unit", ["pair", "list"])
def test_evaluation(unit, two_ranks):
    """Batches of the ranks differ in length, and in the sizes of lists."""
    rows, model = make_rows(unit, 8), make_model()

    def scores(prompt, completion):
        return plain_logps(model, prompt, completion)

    with torch.no_grad():
        expected = float((dpo if unit == "pair" else plackett_luce)(scores, rows, beta=0.1))
        each = [rewards(scores, row, beta=0.1) for row in rows]
    for loss, found in two_ranks(evaluated_on_rank, unit):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert [[one for one in row if one != -100] for row in found] == [
            pytest.approx(row, rel=1e-4, abs=1e-5) for row in each
        ]
