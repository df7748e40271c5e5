# SPDX-License-Identifier: Apache-2.0
"""Token ids: those that TRL makes of a pair, and batches of them."""

import pytest

from fastpref.demo.data import Example

pytest.importorskip("trl")

import torch

from fastpref.demo.tokens import encode, pad, sequence_lengths


def test_pairs_are_encoded_as_trl_encodes_them(tiny, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    model, tokenizer = tiny
    # In the second the space after the prompt becomes part of the completion's first token.
    pairs = [
        Example.pair("Are there 3 figs?\n", "Yes, 3.", "No."),
        Example.pair("figs: ", "31", "4 figs"),
    ]
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = DPOTrainer(
        model=model,
        ref_model=tiny_copy(model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    ours = encode(tokenizer, pairs)
    assert tokenizer.decode(ours[1].prompt) == "figs:"
    assert ours == [
        (row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
        for row in trainer.train_dataset
    ]


def tiny_copy(model):
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


def test_completions_of_a_list_start_where_the_first_of_them_departs(tiny):
    _, tokenizer = tiny
    # The prompt ends in a space, which becomes part of the second completion's first token.
    listed = Example("figs: ", ["(31)", "4 figs", "four"], [0.0, 1.0, 0.5])
    alone = Example("figs: ", ["(31)", "(4)"], [0.0, 1.0])
    assert tokenizer.decode(encode(tokenizer, [alone])[0].prompt) == "figs: "
    prompt, completions = encode(tokenizer, [listed])[0]
    assert tokenizer.decode(prompt) == "figs:"
    written = [tokenizer.decode(prompt + ids) for ids in completions]
    assert written == [f"figs: {text}<eos>" for text in listed.completions]


def test_sequence_lengths_count_the_longest_completion(tiny):
    _, tokenizer = tiny
    listed = Example("figs?\n", ["Yes", "No, not 4 figs", "No"], [0.0, 1.0, 0.5])
    longest = len(tokenizer(listed.prompt + listed.completions[1] + "<eos>")["input_ids"])
    assert sequence_lengths(tokenizer, [listed]) == [longest]


def test_padding_is_neither_attended_to_nor_scored():
    ids, attended, labels = pad([([5, 6], [7]), ([8], [9, 3, 4])], 1, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7, 1], [8, 9, 3, 4]]
    assert attended.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert labels.tolist() == [[-100, -100, 7, -100], [-100, 9, 3, 4]]
