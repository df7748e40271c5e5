# SPDX-License-Identifier: Apache-2.0
"""Every objective that can be chosen trains."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("trl")

import torch

from fastpref import objectives
from fastpref.demo.model import load_model, save
from fastpref.demo.objective import choices, columns
from fastpref.demo.recipe import Recipe
from fastpref.demo.training import preference_trainer, scored_by, warm_up

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about TRL

RECIPE = Recipe(warm_up_steps=10, warm_up_rate=1e-2, steps=2, batch=8, rate=1e-2)
NAMES = choices()
USUAL = {*NAMES[::16], "dpo", "kto", "beta_dpo", "adpo"}


@pytest.fixture(scope="module")
def warmed_up(untrained, pairs, tmp_path_factory):
    """Where a tiny model that can write is saved."""
    directory = tmp_path_factory.mktemp("warmed-up")
    model, tokenizer = untrained()
    warm_up(model, tokenizer, pairs, RECIPE, lambda *_: None)
    save(model, tokenizer, directory)
    return directory


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in NAMES],
)
def test_objective_trains(warmed_up, pairs, lists, tmp_path, name):
    objective = objectives.get(name)
    model, tokenizer = load_model(warmed_up)
    reference, _ = load_model(warmed_up)
    # A number that is a score, a probability and a count alike.
    numbers = dict.fromkeys(columns(objective), 0.75)
    examples = [replace(e, numbers=numbers) for e in (lists if objective.unit == "list" else pairs)]
    losses = []
    with scored_by("fastpref"):
        preference_trainer(
            model,
            reference,
            tokenizer,
            examples[:8],
            objective,
            RECIPE,
            directory=tmp_path,
            progress=lambda step, steps, loss: losses.append(loss),
        ).train()
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    weights = list(zip(model.parameters(), reference.parameters(), strict=True))
    assert all(torch.isfinite(new).all() for new, _ in weights)
    assert not all(new.equal(old) for new, old in weights)
