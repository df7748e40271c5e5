# SPDX-License-Identifier: Apache-2.0
"""A tiny model that was never trained, its tokenizer, and pairs it can tell apart."""

import pytest

from fastpref.demo import quiet, stay_offline

stay_offline()


@pytest.fixture(scope="session")
def pairs():
    from fastpref.demo.data import Pair

    things = "apples bells cups dates eggs figs gloves hats jugs keys".split()
    return [
        Pair(f"Are there {n} {thing}?\n", f"Yes, {n} {thing}.", f"No, not {n}.")
        for n in range(2, 6)
        for thing in things
    ]


@pytest.fixture
def tiny(pairs):
    """(model, tokenizer) with the same random weights every time."""
    pytest.importorskip("trl")
    quiet()
    import torch

    from fastpref.demo.model import ModelSize, build_model, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(pairs, 400)
    size = ModelSize(vocabulary=400, hidden=32, layers=1, heads=2)
    return build_model(tokenizer, size), tokenizer
