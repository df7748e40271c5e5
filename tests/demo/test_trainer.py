# SPDX-License-Identifier: Apache-2.0
"""TRL's trainer with fastpref's objectives: the loss, and the layout each family is given."""

from dataclasses import replace
from typing import Annotated

import pytest

pytest.importorskip("trl")

import torch
from torch import Tensor

from fastpref import objectives
from fastpref.demo.data import Example
from fastpref.demo.model import load_model, save
from fastpref.demo.recipe import Recipe
from fastpref.demo.tokens import encode
from fastpref.demo.trainer import ListTrainer, ObjectiveTrainer, PairTrainer, _losses
from fastpref.demo.training import batch_size, preference_trainer
from fastpref.objectives.signature import ExtraFacts

POLICY = torch.tensor([-1.0, -2.0, -3.0, -5.0])
REFERENCE = torch.tensor([-1.5, -2.5, -2.0, -4.0])
LENGTHS = torch.tensor([2, 4, 3, 5])


def losses_of(tiny, pairs, tmp_path, objective):
    model, tokenizer = tiny
    save(model, tokenizer, tmp_path / "start")
    recipe = Recipe(warm_up_steps=0, steps=3, batch=16, rate=1e-2)
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
    monkeypatch.setattr("fastpref.demo.trainer.config_arguments", lambda objective: {})
    losses, trainer = losses_of(tiny, pairs, tmp_path, objectives.get(name))
    assert isinstance(trainer, PairTrainer)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_objective_that_trl_lacks_learns(tiny, pairs, tmp_path):
    losses, trainer = losses_of(tiny, pairs, tmp_path, objectives.get("simpo"))
    assert isinstance(trainer, PairTrainer)
    assert losses[-1] < losses[0]


def test_columns_reach_the_objective(tiny, pairs, tmp_path):
    seen = []

    def margin(
        chosen: Tensor,
        rejected: Tensor,
        *,
        reward_margin: Annotated[Tensor, ExtraFacts(shapes=("logps",))],
    ) -> Tensor:
        seen.append(reward_margin)
        return rejected - chosen

    pairs = [replace(pair, numbers={"reward_margin": 2.5}) for pair in pairs]
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


def test_units_without_labels_are_the_rejected():
    def fn(policy, reference, *, lengths):
        return (policy - reference) / lengths

    objective = objectives.Objective(fn, unit="unit", scope="unit")
    expected = torch.tensor([-1 / 3, -1 / 5])
    torch.testing.assert_close(_losses(objective, POLICY, REFERENCE, LENGTHS, {}), expected)


def test_lists_have_their_own_lengths_and_a_mask():
    def fn(policy, reference=None, *, mask, lengths, scores):
        assert torch.equal(policy == 0, ~mask)
        return (policy * scores + 100 * lengths * mask).sum(1)

    objective = objectives.Objective(fn, unit="list", scope="list", needs_reference=False)
    extras = {
        "mask": torch.tensor([[True, False, False], [True, True, True]]),
        "scores": torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 3.0]]),
    }
    expected = torch.tensor([2 * -1.0 + 200, -2.0 + 3 * -5.0 + 1200])
    torch.testing.assert_close(_losses(objective, POLICY, None, LENGTHS, extras), expected)


@pytest.mark.parametrize("name", ["adpo", "plackett_luce", "rrhf"])
def test_ragged_lists_have_the_losses_they_have_alone(tiny, lists, tmp_path, name):
    model, tokenizer = tiny
    objective = objectives.get(name)
    torch.manual_seed(1)
    reference = type(model)(model.config)
    trainer = preference_trainer(
        model,
        reference,
        tokenizer,
        lists,
        objective,
        Recipe(warm_up_steps=0, steps=1, batch=16, rate=1e-2),
        directory=tmp_path,
        progress=lambda *_: None,
    )
    assert isinstance(trainer, ListTrainer)
    rows = [trainer.train_dataset[n] for n in range(5)]
    batch = trainer.data_collator(rows)
    assert len(batch["input_ids"]) == batch["mask"].sum() < batch["mask"].numel()
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        expected = []
        for example, ids in zip(lists[:5], encode(tokenizer, lists[:5]), strict=True):
            logps = [logps_of(scorer, ids) for scorer in (model, reference)]
            extras = {"scores": torch.tensor([example.rewards])}
            if "lengths" in objective.extras:
                extras["lengths"] = torch.tensor([list(map(len, ids.completions))])
            kept = logps[: 1 + objective.needs_reference]
            expected.append(objective(*kept, **extras).losses)
    torch.testing.assert_close(loss, torch.cat(expected).mean(), rtol=1e-4, atol=1e-5)


def logps_of(model, ids):
    """(1, K): the log-probability of every completion of a list, by plain log_softmax."""
    sums = []
    for completion in ids.completions:
        row = torch.tensor([ids.prompt + completion])
        logp = model(row).logits.log_softmax(-1)[0, :-1].gather(-1, row[0, 1:, None])
        sums.append(logp[len(ids.prompt) - 1 :].sum())
    return torch.stack(sums).unsqueeze(0)


def test_a_batch_has_about_as_many_completions_whatever_the_lists(pairs, lists):
    recipe = Recipe(warm_up_steps=0, steps=1, batch=30, rate=1e-2)
    assert batch_size(objectives.get("dpo"), pairs, recipe) == 15
    assert batch_size(objectives.get("kto"), lists, recipe) == 15
    assert batch_size(objectives.get("adpo"), pairs, recipe) == 15
    assert batch_size(objectives.get("adpo"), lists, recipe) == 10  # they have 2.97 on average
    long = [Example("a", ["b"] * 90, [*[0.0] * 89, 1.0])]
    assert batch_size(objectives.get("adpo"), long, recipe) == 1
