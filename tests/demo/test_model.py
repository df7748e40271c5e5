# SPDX-License-Identifier: Apache-2.0
"""The tokenizer, the model and what is asked of a directory that holds both."""

import pytest

from fastpref.demo import DemoError
from fastpref.demo.data import load

pytest.importorskip("trl")

from fastpref.demo.model import VOCABULARY, load_model, save, train_tokenizer


def test_tokenizer_fills_the_vocabulary_and_loses_nothing():
    pairs = load(None).examples
    tokenizer = train_tokenizer(pairs, VOCABULARY)
    assert len(tokenizer) == VOCABULARY
    text = pairs[0].prompt + pairs[0].chosen + " é 3.5\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # One word, one token; one number, one token.
    assert len(tokenizer("Noor has 27 golden walnuts")["input_ids"]) == 5


def test_saved_model_is_loaded_unchanged(tiny, tmp_path):
    model, tokenizer = tiny
    save(model, tokenizer, tmp_path)
    loaded, loaded_tokenizer = load_model(tmp_path)
    assert loaded.dtype == model.dtype
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).equal(parameter), name
    assert loaded_tokenizer("4 figs")["input_ids"] == tokenizer("4 figs")["input_ids"]


@pytest.mark.parametrize("damage", ["missing", "empty", "no weights", "no tokenizer"])
def test_directory_without_a_model_is_refused_in_one_line(tiny, tmp_path, damage):
    model, tokenizer = tiny
    directory = tmp_path / "model"
    if damage != "missing":
        directory.mkdir()
    if damage == "no weights":
        save(model, tokenizer, directory)
        (directory / "model.safetensors").unlink()
    if damage == "no tokenizer":
        model.save_pretrained(directory)
    with pytest.raises(DemoError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert message.startswith(f"--model {directory}: ") and "\n" not in message
    assert "expected a local directory with a transformers causal LM and its tokenizer" in message
