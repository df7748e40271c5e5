# SPDX-License-Identifier: Apache-2.0
"""Running averages: those of the steps before, the same however a step is accumulated, saved and
restored to the bit."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref.integrations.transformers import PreferenceLabels, loss_func
from fastpref.objectives import RunningMoments, combine
from tests.integrations.transformers.trainings import (
    check_step,
    make_model,
    make_rows,
    make_trainer,
    plain_logps,
    train,
)

MOVING = {"learning_rate": 0.05, "num_train_epochs": 3}


def moved(loss, rows, folder, resume=None, **arguments):
    """The weights after a training that moves them, and the running state."""
    trainer = make_trainer(loss, rows, folder, **{**MOVING, **arguments})
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat([one.detach().flatten() for one in trainer.model.parameters()])
    return weights, loss._state.state_dict(), trainer


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "restored"), [("bco", False), ("alpha_dpo", True)])
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


def bco(scores, rows, delta, beta=0.1):
    losses = []
    for row in rows:
        reward = beta * (scores(row["prompt_ids"], row["completion_ids"]).sum() - row["ref_logps"])
        sign = 1.0 if row["label"] else -1.0
        losses.append(-torch.nn.functional.logsigmoid(sign * (reward - delta)))
    return torch.stack(losses).mean()


def mean_rewards(rows, beta=0.1):
    """Of the first model, by label."""
    model, found = make_model(), {True: [], False: []}
    with torch.no_grad():
        for row in rows:
            logp = plain_logps(model, row["prompt_ids"], row["completion_ids"]).sum()
            found[row["label"]].append(beta * (float(logp) - row["ref_logps"]))
    return {label: sum(values) / len(values) for label, values in found.items()}


@pytest.mark.heavy
def test_a_step_takes_what_the_steps_before_it_left(tmp_path):
    rows = make_rows("unit", count=8)  # six in the first step, two in the second
    loss = loss_func("bco")
    gradients, logged = train(loss, rows, tmp_path, gradient_accumulation_steps=3)
    first, second = mean_rewards(rows[:6]), mean_rewards(rows[6:])
    delta = (first[True] + first[False]) / 2
    assert abs(delta) > 1e-3
    check_step(gradients[0], logged[0], lambda scores: bco(scores, rows[:6], 0.0))
    check_step(gradients[1], logged[1], lambda scores: bco(scores, rows[6:], delta))
    state = loss._state.state_dict()
    for part, label in (("chosen", True), ("rejected", False)):
        expected = 0.9 * first[label] + 0.1 * second[label]
        assert state[part]["mean"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.heavy
def test_gaps_per_token(tmp_path):
    rows = make_rows("pair", count=4)
    loss = loss_func("alpha_dpo")
    train(loss, rows, tmp_path, gradient_accumulation_steps=2)
    model, gaps = make_model(), []
    with torch.no_grad():
        for row in rows:
            sides = [
                (float(plain_logps(model, row["prompt_ids"], row[f"{one}_ids"]).sum()), one)
                for one in ("chosen", "rejected")
            ]
            means = [(s - row[f"ref_{one}_logps"]) / len(row[f"{one}_ids"]) for s, one in sides]
            gaps.append(means[0] - means[1])
    extras = loss._state.extras()
    assert float(extras["running_mean"]) == pytest.approx(sum(gaps) / 4, rel=1e-4)
    assert float(extras["running_std"]) == pytest.approx(float(torch.tensor(gaps).std()), rel=1e-4)


def test_a_state_in_json_is_the_same():
    """Of a float64 model too."""
    for dtype in (torch.float32, torch.float64):
        whole, halved = loss_func("alpha_dpo")._state, loss_func("alpha_dpo")._state
        labels = PreferenceLabels({"pair_lengths": torch.full((5, 2), 3)})
        for state in (whole, halved):
            state.begin({})
        for values in torch.randn(4, 5, 2, dtype=dtype):
            for state in (whole, halved):
                state.collect(values, labels)
                state.end_step()
            halved.begin(json.loads(json.dumps(halved.state_dict())))
        for name, value in whole.extras().items():
            assert value.dtype == dtype
            assert torch.equal(halved.extras()[name], value)


@pytest.mark.heavy
def test_a_new_training_starts_from_nothing(tmp_path):
    rows, loss = make_rows("pair"), loss_func("bco_pair")
    _, first, trainer = moved(loss, rows, tmp_path, learning_rate=0.0)
    trainer.train()
    assert loss._state.state_dict() == first


@pytest.mark.heavy
def test_a_checkpoint_without_state_is_said(tmp_path, caplog):
    rows = make_rows("pair")
    saving = {"save_strategy": "steps", "save_steps": 2}
    moved(loss_func("dpo"), rows, tmp_path, **saving)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace("PreferenceLossState", "Another"))
    with caplog.at_level("WARNING", logger="fastpref"):
        _, state, _ = moved(loss_func("beta_dpo"), rows, tmp_path, str(tmp_path / "checkpoint-2"))
    assert "does not hold the running state" in caplog.text
    assert state["gap"]["updates"] == 10
    caplog.clear()
    with caplog.at_level("WARNING", logger="fastpref"):
        moved(loss_func("dpo"), rows, tmp_path, str(tmp_path / "checkpoint-2"))
    assert not caplog.text  # there is nothing to hold


def test_nobody_keeps_the_state(tmp_path):
    rows, loss = make_rows("pair"), loss_func("beta_dpo")
    trainer = make_trainer(loss, rows, tmp_path)
    trainer.remove_callback(type(loss.callback))
    with pytest.raises(RuntimeError, match=r"beta_dpo takes running_mean.*loss\.callback"):
        trainer.train()


def test_which_averages_are_known():
    mixed = loss_func(combine(["dpo", "bco_pair", "sft"], [0.8, 0.2, 1.0]))
    assert set(mixed._state.extras()) == {"delta"}
    assert loss_func("dpo")._state.extras() == {}
    assert loss_func("kto")._state.extras() == {}
    with pytest.raises(ValueError, match=r"takes running_mean.*RunningMoments"):
        loss_func(combine(["dpo", "beta_dpo"], [1.0, 1.0]))


def test_moments_of_one_process():
    """The moments are those of ``RunningMoments``."""
    loss, expected = loss_func("beta_dpo"), RunningMoments()
    loss._state.begin({})
    for step in range(3):
        ratios = torch.randn(4, 2)
        labels = PreferenceLabels({"pair_lengths": torch.ones(4, 2, dtype=torch.long)})
        loss._state.collect(ratios[:3], labels)
        loss._state.collect(ratios[3:], labels)
        loss._state.end_step()
        expected.update(ratios[:, 0] - ratios[:, 1])
        assert float(loss._state.extras()["running_mean"]) == float(expected.mean), step
