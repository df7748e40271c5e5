# SPDX-License-Identifier: Apache-2.0
"""TRL's trainer with fastpref's objectives: the loss, and the layout each family is given."""

from typing import Annotated

import pytest

pytest.importorskip("trl")

import torch
from torch import Tensor

from fastpref import objectives
from fastpref.demo.data import Pair
from fastpref.demo.model import load_model, save
from fastpref.demo.recipe import Recipe
from fastpref.demo.trainer import ObjectiveTrainer, _losses
from fastpref.demo.training import preference_trainer
from fastpref.objectives.signature import ExtraFacts

POLICY = torch.tensor([-1.0, -2.0, -3.0, -5.0])
REFERENCE = torch.tensor([-1.5, -2.5, -2.0, -4.0])
LENGTHS = torch.tensor([2, 4, 3, 5])


def losses_of(tiny, pairs, tmp_path, objective):
    model, tokenizer = tiny
    save(model, tokenizer, tmp_path / "start")
    recipe = Recipe(warm_up_steps=0, steps=3, batch=8, rate=1e-2)
    losses = []
    trainer = preference_trainer(
        load_model(tmp_path / "start")[0],
        model,
        tokenizer,
        pairs,
        objective,
        recipe,
        directory=tmp_path,
        progress=lambda step, steps, loss: losses.append(loss),
    )
    trainer.train()
    return losses, trainer


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge"])
def test_same_losses_as_trl(tiny, pairs, tmp_path, name, monkeypatch):
    expected, trainer = losses_of(tiny, pairs, tmp_path, objectives.get(name))
    assert not isinstance(trainer, ObjectiveTrainer)
    monkeypatch.setattr("fastpref.demo.objective.LOSS_TYPES", {})
    monkeypatch.setattr("fastpref.demo.trainer.LOSS_TYPES", {})
    losses, trainer = losses_of(tiny, pairs, tmp_path, objectives.get(name))
    assert isinstance(trainer, ObjectiveTrainer)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_objective_that_trl_lacks_learns(tiny, pairs, tmp_path):
    losses, trainer = losses_of(tiny, pairs, tmp_path, objectives.get("simpo"))
    assert isinstance(trainer, ObjectiveTrainer)
    assert losses[-1] < losses[0]


def test_columns_reach_the_objective(tiny, pairs, tmp_path):
    seen = []

    def margin(
        chosen: Tensor,
        rejected: Tensor,
        *,
        reward_margin: Annotated[Tensor, ExtraFacts(aligned=True)],
    ) -> Tensor:
        seen.append(reward_margin)
        return rejected - chosen

    pairs = [Pair(p.prompt, p.chosen, p.rejected, {"reward_margin": 2.5}) for p in pairs]
    losses_of(tiny, pairs, tmp_path, objectives.Objective(margin, unit="pair", scope="pair"))
    assert len(seen) == 3 and all(torch.equal(given, torch.full((8,), 2.5)) for given in seen)


def test_pairs_are_the_two_halves():
    def fn(chosen, rejected, ref_chosen, ref_rejected, *, chosen_lengths, rejected_lengths):
        return (chosen - ref_chosen) / chosen_lengths - (rejected - ref_rejected) / rejected_lengths

    objective = objectives.Objective(fn, unit="pair", scope="pair")
    expected = torch.tensor([0.5 / 2 + 1 / 3, 0.5 / 4 + 1 / 5])
    torch.testing.assert_close(_losses(objective, POLICY, REFERENCE, LENGTHS, {}), expected)


def test_units_are_labelled_by_their_half():
    def fn(policy, reference, *, lengths, labels):
        return (policy - reference) / lengths * torch.where(labels, -1, 1)

    objective = objectives.Objective(fn, unit="unit", scope="unit")
    expected = torch.tensor([-0.5 / 2, -0.5 / 4, -1 / 3, -1 / 5])
    torch.testing.assert_close(_losses(objective, POLICY, REFERENCE, LENGTHS, {}), expected)


def test_lists_hold_the_chosen_and_then_the_rejected():
    def fn(policy, reference=None, *, lengths, scores):
        return (policy * scores).sum(1) + 100 * lengths[:, 1]

    objective = objectives.Objective(fn, unit="list", scope="list", needs_reference=False)
    expected = torch.tensor([-1.0 + 300, -2.0 + 500])
    torch.testing.assert_close(_losses(objective, POLICY, None, LENGTHS, {}), expected)
