# SPDX-License-Identifier: Apache-2.0
"""The sizes of a training by the length of its texts."""

import pytest

from fastpref.demo.recipe import plan


@pytest.mark.parametrize(
    ("length", "warm_up", "steps"),
    [(10, 800, 100), (39, 769, 100), (80, 375, 50), (200, 150, 30)],
)
def test_longer_texts_take_fewer_steps(length, warm_up, steps):
    recipe = plan([length, length], built=True, steps=None, seed=3)
    assert (recipe.warm_up_steps, recipe.steps, recipe.seed) == (warm_up, steps, 3)


def test_trained_model_is_not_warmed_up_and_learns_slower():
    built, loaded = (plan([36], built=built, steps=7, seed=0) for built in (True, False))
    assert loaded.warm_up_steps == 0 < built.warm_up_steps
    assert loaded.rate < built.rate
    assert built.steps == loaded.steps == 7


def test_comparison_takes_few_steps_of_twice_the_batch():
    recipe = plan([36], built=True, steps=None, seed=0)
    assert recipe.to_compare().steps == 10
    assert recipe.to_compare().batch == 2 * recipe.batch
    assert plan([36], built=True, steps=2, seed=0).to_compare().steps == 2
