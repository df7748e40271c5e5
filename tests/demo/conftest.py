# SPDX-License-Identifier: Apache-2.0
"""A tiny model that was never trained, its tokenizer, and pairs it can tell apart."""

import pytest

from fastpref.demo import quiet, stay_offline

stay_offline()


@pytest.fixture(scope="session")
def pairs():
    from fastpref.demo.data import Example

    things = "apples bells cups dates eggs figs gloves hats jugs keys".split()
    return [
        Example.pair(f"Are there {n} {thing}?\n", f"Yes, {n} {thing}.", f"No, not {n}.")
        for n in range(2, 6)
        for thing in things
    ]


@pytest.fixture(scope="session")
def lists(pairs):
    """Lists of two, three and four, whose best is anywhere in them."""
    from fastpref.demo.data import Example

    found = []
    for n, pair in enumerate(pairs):
        rewards = {pair.chosen: 1.0, pair.rejected: 0.0, f"No, {n}.": 0.25, f"{n} of them.": 0.5}
        kept = list(rewards)[: 2 + n % 3]
        kept = kept[n % len(kept) :] + kept[: n % len(kept)]
        found.append(Example(pair.prompt, kept, [rewards[text] for text in kept]))
    return found


@pytest.fixture(scope="session")
def untrained(pairs):
    """Makes (model, tokenizer) with the same random weights every time."""
    pytest.importorskip("trl")
    quiet()
    import torch

    from fastpref.demo.model import ModelSize, build_model, train_tokenizer

    def make():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(pairs, 400)
        size = ModelSize(vocabulary=400, hidden=32, layers=1, heads=2)
        return build_model(tokenizer, size), tokenizer

    return make


@pytest.fixture
def tiny(untrained):
    """(model, tokenizer) that were never trained."""
    return untrained()
