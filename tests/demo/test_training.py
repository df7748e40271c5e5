# SPDX-License-Identifier: Apache-2.0
"""Warm-up, preference training and its measures, on a model of a few thousand weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastpref import objectives
from fastpref.demo.data import Example, load, split
from fastpref.demo.recipe import MAX_LENGTH, Recipe

pytest.importorskip("trl")

import torch

from fastpref.demo.model import ModelSize, build_model, load_model, save, train_tokenizer
from fastpref.demo.tokens import sequence_lengths
from fastpref.demo.training import (
    batch_size,
    complete,
    preference_gaps,
    preference_trainer,
    preferred_share,
    scored_by,
    warm_up,
)
from fastpref.integrations.trl import FastDPOTrainer

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, about TRL
]

RECIPE = Recipe(
    warm_up_steps=4, warm_up_batch=8, warm_up_rate=1e-2, steps=12, batch=16, rate=1e-2, seed=0
)
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def train(tiny, pairs, tmp_path, objective="dpo", recipe=RECIPE):
    """Train `tiny` in place and return the losses of the steps."""
    model, tokenizer = tiny
    save(model, tokenizer, tmp_path / "start")
    losses = []
    trainer = preference_trainer(
        model,
        load_model(tmp_path / "start")[0],
        tokenizer,
        pairs,
        objectives.get(objective),
        recipe,
        directory=tmp_path,
        progress=lambda step, steps, loss: losses.append(loss),
    )
    trainer.train()
    return losses


def share(tiny, pairs):
    return preferred_share(preference_gaps(*tiny, pairs))


def test_warm_up_learns_to_write_completions(tiny, pairs):
    model, tokenizer = tiny
    losses = []
    recipe = replace(RECIPE, warm_up_steps=90)
    warm_up(model, tokenizer, pairs, recipe, lambda *step: losses.append(step))
    assert [step[:2] for step in losses] == [(n, 90) for n in range(1, 91)]
    assert losses[-1][2] < losses[0][2] / 3
    assert complete(model, tokenizer, pairs[0]).startswith(("Yes", "No"))


def test_warm_up_loss_is_the_mean_over_completion_tokens(tiny, pairs):
    model, tokenizer = tiny
    pair = Example.pair("Are there 3 figs?\n", "Yes, 3 figs.", "Yes, 3 figs.")
    prompt = len(tokenizer(pair.prompt)["input_ids"])
    ids = torch.tensor([tokenizer(pair.prompt + pair.chosen + "<eos>")["input_ids"]])
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[0, prompt - 1 : -1]
    expected = -logp.gather(-1, ids[0, prompt:, None]).mean()
    losses = []
    once = replace(RECIPE, warm_up_steps=1, warm_up_batch=2)
    warm_up(model, tokenizer, [pair], once, lambda *step: losses.append(step[2]))
    assert losses[0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("head", ["stock", "fastpref"])
def test_preference_training_reverses_a_preference(tiny, pairs, tmp_path, head):
    with scored_by(head):
        if share(tiny, pairs) > 0.5:
            pairs = [replace(pair, rewards=(0.0, 1.0)) for pair in pairs]
        assert share(tiny, pairs) < 0.5
        losses = train(tiny, pairs, tmp_path)
        assert share(tiny, pairs) > 0.9
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5 and len(losses) == RECIPE.steps


def test_training_on_lists_makes_their_best_the_likeliest(tiny, lists, tmp_path):
    with scored_by("fastpref"):
        before = preference_gaps(*tiny, lists)
        train(tiny, lists, tmp_path, objective="softmax_dpo")
        gaps = preference_gaps(*tiny, lists)
    assert preferred_share(before) < 0.7 < 0.9 < preferred_share(gaps)


@pytest.mark.parametrize("name", ["adpo", "rrhf", "kto", "npo", "odpo"])
def test_first_loss_is_that_of_plain_log_softmax(tiny, lists, tmp_path, name):
    """Ragged lists, their best and worst as single responses or the worst alone, and pairs with a
    column; the policy is not the reference."""
    model, tokenizer = tiny
    torch.manual_seed(1)
    reference = type(model)(model.config)
    objective = objectives.get(name)
    examples = [replace(e, numbers={"reward_margin": n + 1.0}) for n, e in enumerate(lists[:5])]
    losses = []
    trainer = preference_trainer(
        model,
        reference,
        tokenizer,
        examples,
        objective,
        replace(RECIPE, steps=1, batch=32),
        directory=tmp_path,
        progress=lambda step, steps, loss: losses.append(loss),
    )
    expected = expected_loss(objective, (model, reference), tokenizer, examples)
    trainer.train()
    assert isinstance(trainer, FastDPOTrainer)
    assert losses == [pytest.approx(expected, rel=1e-3, abs=1e-3)]


@torch.no_grad()
def expected_loss(objective, models, tokenizer, examples):
    """The mean over units of one batch of all ``examples``."""

    def given(completions):
        """Of a prompt's completions, the log-probabilities by each model, and their lengths."""
        prompt = len(tokenizer(example.prompt)["input_ids"])
        logps, lengths = [[] for _ in models], []
        for completion in completions:
            ids = torch.tensor([tokenizer(example.prompt + completion + "<eos>")["input_ids"]])
            lengths.append(ids.shape[1] - prompt)
            for found, model in zip(logps, models, strict=True):
                logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
                found.append(logp[prompt - 1 :].sum())
        return [torch.stack(found) for found in logps], torch.tensor(lengths)

    units = []  # of log-probabilities by policy and reference, (r,) each, and extras
    for example in examples:
        if objective.unit == "list":
            logps, lengths = given(example.completions)
            units.append((logps, {"scores": torch.tensor(example.rewards), "lengths": lengths}))
            continue
        logps, _ = given([example.chosen, example.rejected])
        margin = torch.tensor(example.numbers["reward_margin"])
        extras = {"reward_margin": margin, "labels": torch.tensor([True, False])}
        units.append((logps, extras))

    def losses(logps, extras):
        extras = {name: value for name, value in extras.items() if name in objective.extras}
        return objective(*logps, **extras).losses

    if objective.unit == "list":  # each by itself, so that none has a place to fill
        found = [
            losses(
                [row[None] for row in logps[: 1 + objective.needs_reference]],
                {name: value[None] for name, value in extras.items()},
            )
            for logps, extras in units
        ]
        return torch.cat(found).mean().item()
    policy, ref = (torch.stack([logps[m] for logps, _ in units], dim=1) for m in (0, 1))
    columns = {n: torch.stack([e[n] for _, e in units], dim=-1) for n in units[0][1]}
    if objective.unit == "pair":
        return losses([*policy, *ref], columns).mean().item()
    columns = {"labels": columns["labels"].flatten()}
    if "labels" not in objective.extras:
        policy, ref = policy[1], ref[1]
    return losses([policy.flatten(), ref.flatten()], columns).mean().item()


@pytest.mark.parametrize("name", ["ipo", pytest.param("hinge", marks=pytest.mark.slow)])
def test_objective_that_trl_has_trains_alike_with_fastdpotrainer(
    pairs, tiny, tmp_path, monkeypatch, name
):
    model, tokenizer = tiny
    save(model, tokenizer, tmp_path / "fresh")
    recipe = replace(RECIPE, steps=3)
    runs = []
    for directory in ("trl", "fast"):
        fresh, _ = load_model(tmp_path / "fresh")
        runs.append(train((fresh, tokenizer), pairs, tmp_path / directory, name, recipe))
        monkeypatch.setattr("fastpref.demo.training.config_arguments", lambda objective: {})
    assert runs[1] == pytest.approx(runs[0], rel=1e-3) and len(runs[0]) == 3


def test_a_batch_has_about_as_many_completions_whatever_the_unit(pairs, lists):
    recipe = replace(RECIPE, batch=30)
    assert batch_size(objectives.get("dpo"), lists, recipe) == 15
    assert batch_size(objectives.get("kto"), pairs, recipe) == 30
    assert batch_size(objectives.get("adpo"), pairs, recipe) == 15
    assert batch_size(objectives.get("adpo"), lists, recipe) == 10  # they have 2.97 on average
    long = [Example("a", ["b"] * 90, [*[0.0] * 89, 1.0])]
    assert batch_size(objectives.get("adpo"), long, recipe) == 1


def test_same_seed_trains_the_same_model(pairs, tmp_path, tiny):
    model, tokenizer = tiny
    save(model, tokenizer, tmp_path / "fresh")
    trained = []
    for name in ("one", "two"):
        fresh = load_model(tmp_path / "fresh")
        warm_up(*fresh, pairs, replace(RECIPE, warm_up_steps=3), lambda *_: None)
        train(fresh, pairs, tmp_path / name, recipe=replace(RECIPE, steps=2))
        trained.append(fresh[0])
    for one, two in zip(*(m.parameters() for m in trained), strict=True):
        assert one.equal(two)


def test_gaps_are_differences_of_summed_log_probabilities(tiny, lists):
    model, tokenizer = tiny
    for example, gap in zip(lists, preference_gaps(model, tokenizer, lists), strict=True):
        sums = []
        prompt = len(tokenizer(example.prompt)["input_ids"])
        for completion in (example.chosen, example.rejected):
            ids = torch.tensor([tokenizer(example.prompt + completion + "<eos>")["input_ids"]])
            with torch.no_grad():
                logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
            sums.append(logp[prompt - 1 :].sum().item())
        assert gap == pytest.approx(sums[0] - sums[1], abs=1e-4)


def test_share_counts_gaps_above_zero():
    assert preferred_share([0.5, -1.0, 0.0, 2.0]) == 0.5


def test_prompt_that_merges_into_the_completion_is_continued(tiny):
    assert isinstance(complete(*tiny, Example.pair("fi", "gs", "gs too")), str)


@pytest.mark.skipif(not REAL.exists(), reason="no real preference data here")
@pytest.mark.parametrize(
    ("name", "objective", "first_loss"),
    [
        ("gsm8k_pairs.jsonl", "dpo", 0.6931),
        ("gsm8k_lists.jsonl", "softmax_dpo", 1.6094),  # log 5
        pytest.param("gsm8k_lists.jsonl", "dpo", 0.6931, marks=pytest.mark.slow),
    ],
)
def test_real_preferences_train(tmp_path, name, objective, first_loss):
    examples = load(REAL / name).examples
    assert len(examples) == 1163
    torch.manual_seed(0)
    tokenizer = train_tokenizer(examples, 2000)
    lengths = sequence_lengths(tokenizer, examples[:200])
    examples = [e for e, n in zip(examples, lengths, strict=False) if n <= MAX_LENGTH]
    assert len(examples) > 50
    train_examples, held_out = split(examples[:50], 0)
    model = build_model(tokenizer, ModelSize(vocabulary=2000, hidden=32, layers=1, heads=2))
    recipe = replace(RECIPE, warm_up_steps=2, steps=2)
    losses = []
    warm_up(model, tokenizer, train_examples, recipe, lambda *step: losses.append(step[2]))
    assert losses[0] == pytest.approx(7.6, abs=0.3)  # log of the vocabulary
    losses = train((model, tokenizer), train_examples, tmp_path, objective, recipe)
    assert losses[0] == pytest.approx(first_loss, abs=1e-3)
    assert 0 <= share((model, tokenizer), held_out) <= 1


def test_pairs_are_short():
    pairs = load(None).examples
    assert max(sequence_lengths(train_tokenizer(pairs, 8192), pairs)) < 64
