# SPDX-License-Identifier: Apache-2.0
"""Warm-up, preference training and its measures, on a model of a few thousand weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastpref import objectives
from fastpref.demo.arithmetic import SHIPPED
from fastpref.demo.data import Pair, load_pairs, split
from fastpref.demo.recipe import MAX_LENGTH, Recipe

pytest.importorskip("trl")

import torch

from fastpref.demo.model import ModelSize, build_model, load_model, save, train_tokenizer
from fastpref.demo.training import (
    complete,
    preference_trainer,
    preferred_share,
    scored_by,
    sequence_lengths,
    warm_up,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about TRL

RECIPE = Recipe(
    warm_up_steps=4, warm_up_batch=8, warm_up_rate=1e-2, steps=12, batch=8, rate=1e-2, seed=0
)
REAL_PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_pairs.jsonl"


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
    pair = Pair("Are there 3 figs?\n", "Yes, 3 figs.", "Yes, 3 figs.")
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
        if preferred_share(*tiny, pairs) > 0.5:
            pairs = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
        assert preferred_share(*tiny, pairs) < 0.5
        losses = train(tiny, pairs, tmp_path)
        assert preferred_share(*tiny, pairs) > 0.9
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5 and len(losses) == RECIPE.steps


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


def test_share_counts_pairs_by_summed_log_probability(tiny, pairs):
    model, tokenizer = tiny
    expected = 0
    for pair in pairs:
        sums = []
        prompt = len(tokenizer(pair.prompt)["input_ids"])
        for completion in (pair.chosen, pair.rejected):
            ids = torch.tensor([tokenizer(pair.prompt + completion + "<eos>")["input_ids"]])
            with torch.no_grad():
                logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
            sums.append(logp[prompt - 1 :].sum())
        expected += int(sums[0] > sums[1])
    assert preferred_share(model, tokenizer, pairs) == expected / len(pairs)


def test_prompt_that_merges_into_the_completion_is_continued(tiny):
    assert isinstance(complete(*tiny, Pair("fi", "gs", "gs too")), str)


def test_sequence_lengths_count_the_longer_completion(tiny):
    _, tokenizer = tiny
    pair = Pair("figs?\n", "Yes", "No, not 4 figs")
    longest = len(tokenizer(pair.prompt + pair.rejected + "<eos>")["input_ids"])
    assert sequence_lengths(tokenizer, [pair]) == [longest]


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="no real preference data here")
def test_real_pairs_train(tmp_path):
    pairs = load_pairs(REAL_PAIRS)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(pairs, 2000)
    lengths = sequence_lengths(tokenizer, pairs)
    pairs = [pair for pair, n in zip(pairs, lengths, strict=True) if n <= MAX_LENGTH]
    assert len(pairs) > 300
    train_pairs, held_out = split(pairs[:100], 0)
    model = build_model(tokenizer, ModelSize(vocabulary=2000, hidden=32, layers=1, heads=2))
    recipe = replace(RECIPE, warm_up_steps=2, steps=2)
    losses = []
    warm_up(model, tokenizer, train_pairs, recipe, lambda *step: losses.append(step[2]))
    assert losses[0] == pytest.approx(7.6, abs=0.3)  # log of the vocabulary
    losses = train((model, tokenizer), train_pairs, tmp_path, recipe=recipe)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert 0 <= preferred_share(model, tokenizer, held_out) <= 1


def test_shipped_pairs_are_short():
    pairs = load_pairs(SHIPPED)
    assert max(sequence_lengths(train_tokenizer(pairs, 8192), pairs)) < 64
