# SPDX-License-Identifier: Apache-2.0
"""Two processes: the same loss and gradient as one with the whole batch, uneven last batches
included."""

import contextlib
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

from accelerate.state import AcceleratorState, GradientState

from fastpref.integrations.transformers import loss_func
from tests.integrations.transformers.plain_losses import dpo, kto
from tests.integrations.transformers.trainings import check_step, make_rows, train

pytestmark = pytest.mark.heavy

# Ranks take what is left of the rows, and no row twice.
UNEVEN = {"even_batches": False}


@contextlib.contextmanager
def process(rank):
    """The environment of one of two processes that torchrun started."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in given.items()})
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


def on_rank(rank, name, unit, accumulated, shared):
    """Gradients and logged losses of a training, and the running state it leaves."""
    with process(rank), tempfile.TemporaryDirectory() as folder:
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
    assert first["gap"] == pytest.approx(expected, rel=1e-4)
