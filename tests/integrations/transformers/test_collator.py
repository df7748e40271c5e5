# SPDX-License-Identifier: Apache-2.0
"""Batches: rows, targets, what is counted, columns of references and extras, and bad rows."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref.integrations.transformers import PreferenceCollator, PreferenceLabels, loss_func
from fastpref.objectives import Objective

PAIR = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}
OTHER = {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10]}
REFERENCE = {"ref_chosen_logps": -3.5, "ref_rejected_logps": -1.25}


def collate(objective, *rows, **given):
    return PreferenceCollator(objective, **{"pad_token_id": 0, **given})(list(rows))


def test_pairs():
    batch = collate("simpo", PAIR, OTHER)
    assert list(batch) == [
        "labels",
        "input_ids",
        "attention_mask",
        "fused_labels",
        "fused_lm_head",
    ]
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 0, 0, 0],
        [1, 2, 6, 0, 0],
        [7, 9, 10, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 3, 3]
    assert batch["fused_labels"].tolist() == [
        [-100, -100, 3, 4, 5],
        [-100, 8, -100, -100, -100],
        [-100, -100, 6, -100, -100],
        [-100, 9, 10, -100, -100],
    ]
    assert batch["fused_lm_head"] is True
    assert batch["labels"].lengths.tolist() == [[3, 1], [1, 2]]
    assert batch["input_ids"].dtype == batch["fused_labels"].dtype == torch.long


def test_left_padding_and_truncation():
    batch = collate("simpo", PAIR, padding_side="left", max_length=4, pad_token_id=30)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [30, 1, 2, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert batch["fused_labels"].tolist() == [[-100, -100, 3, 4], [-100, -100, -100, 6]]
    assert batch["labels"].lengths.tolist() == [[2, 1]]


def test_lists_of_different_sizes():
    rows = [
        {"prompt_ids": [1], "completions_ids": [[2], [3, 4], [5]], "scores": [1, 3, 2]},
        {"prompt_ids": [6], "completions_ids": [[7], [8]], "scores": [0.5, 0]},
    ]
    rows[0]["ref_logps"], rows[1]["ref_logps"] = [-1, -2, -3], [-4, -5]
    batch = collate("lipo", *rows)
    assert batch["input_ids"][:, 0].tolist() == [1, 1, 1, 6, 6]
    labels = batch["labels"]
    assert labels.lengths.tolist() == [[1, 2, 1], [1, 1, 0]]
    assert labels.numbers("scores").tolist() == [[1, 3, 2], [0.5, 0, 0]]
    assert labels.numbers("ref_logps").tolist() == [[-1, -2, -3], [-4, -5, 0]]
    assert labels.ne(-100).sum() == 2


def test_labelled_responses():
    rows = [{"prompt_ids": [1], "completion_ids": [2], "label": one} for one in (True, False)]
    labels = collate("apo_zero_unpaired", *({**row, "ref_logps": -1} for row in rows))["labels"]
    assert labels.numbers("labels").tolist() == [1, 0]
    assert labels.numbers("ref_logps").tolist() == [[-1], [-1]]
    assert labels.ne(-100).sum() == 2


@pytest.mark.parametrize("padding", [True, False])
def test_tensors_and_arrays_as_columns(padding):
    row = {name: torch.tensor(ids) for name, ids in PAIR.items()}
    row |= {name: torch.tensor(value).numpy() for name, value in REFERENCE.items()}
    batch = collate("dpo", row)
    expected = collate("dpo", PAIR | REFERENCE)
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["labels"].numbers("ref_logps").tolist() == [[-3.5, -1.25]]


def test_reference_of_each_token_is_cut_as_they_are():
    row = PAIR | {"ref_chosen_logps": [-1, -2, -4], "ref_rejected_logps": [-8]}
    whole, cut = (collate("dpo", row, max_length=one)["labels"] for one in (None, 4))
    assert whole.numbers("ref_logps").tolist() == [[-7, -8]]
    assert cut.numbers("ref_logps").tolist() == [[-3, -8]]
    bare = {"prompt_ids": [], "chosen_ids": [3, 4], "rejected_ids": [5, 6, 7]}
    bare |= {"ref_chosen_logps": [-1, -2], "ref_rejected_logps": [-1, -2, -4]}
    # Nothing predicts the first token.
    labels = collate("dpo", bare)["labels"]
    assert labels.lengths.tolist() == [[1, 2]]
    assert labels.numbers("ref_logps").tolist() == [[-2, -6]]


def test_optional_extras_are_taken_where_they_are():
    labels = collate("beta_dpo", PAIR | REFERENCE | {"keep": True, "reward_margin": 3})["labels"]
    assert set(labels) == {"pair_lengths", "ref_logps", "keep"}
    with pytest.raises(ValueError, match="needs the columns keep"):
        collate("beta_dpo", PAIR | REFERENCE | {"keep": True}, OTHER | REFERENCE)


def test_extras_of_a_function_of_ones_own():
    def loss(chosen, rejected, ref_chosen, ref_rejected, *, difficulty, strength=1.0):
        return difficulty * strength * (rejected - chosen)

    row = PAIR | REFERENCE | {"difficulty": 0.25, "strength": 3}
    assert set(collate(loss, row)["labels"]) == {"pair_lengths", "ref_logps", "difficulty"}
    with pytest.raises(ValueError, match="loss needs the columns difficulty"):
        collate(loss, PAIR | REFERENCE)


def test_rows_of_numbers():
    rows = [one | REFERENCE | {"prompt_embeddings": [0.5, 1, 2]} for one in (PAIR, OTHER)]
    labels = collate("relative_po", *rows)["labels"]
    assert labels.numbers("prompt_embeddings").tolist() == [[0.5, 1, 2]] * 2


def test_units_are_what_the_trainer_counts():
    """As different transformers count them, and after what moves and copies batches."""
    labels = collate("dpo", PAIR | REFERENCE, OTHER | REFERENCE)["labels"]
    for one in (labels, copy.copy(labels), pickle.loads(pickle.dumps(labels))):
        assert isinstance(one, PreferenceLabels)
        assert one.ne(-100).sum() == 2
        assert one[..., 1:].ne(-100).sum() == 2
    assert labels["pair_lengths"] is labels.lengths


def test_numbers_survive_a_cast_of_all_floating_tensors():
    """As the Trainer does to a batch under DeepSpeed."""
    row = PAIR | {"ref_chosen_logps": -1234.5678, "ref_rejected_logps": -0.001}
    labels = collate("dpo", row)["labels"]
    cast = type(labels)(
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in labels.items()}
    )
    expected = torch.tensor([[-1234.5678, -0.001]])
    assert torch.equal(cast.numbers("ref_logps"), expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"pad_token_id": None}, ValueError, "pad_token_id must be the id of a token, got None"),
        ({"max_length": 1}, ValueError, "max_length must be None or at least 2, got 1"),
        (
            {"padding_side": "both"},
            ValueError,
            "padding_side must be 'right' or 'left', got 'both'",
        ),
        ({"objective": "dpq"}, ValueError, "no objective is called 'dpq'; perhaps dpo"),
        ({"objective": loss_func("dpo")}, TypeError, "got PreferenceLoss; pass its .objective"),
        ({"objective": "grpo"}, ValueError, "grpo, which works on tokens of sampled responses"),
        ({"objective": "tdpo"}, ValueError, "tdpo needs chosen_kl and rejected_kl, which follow"),
    ],
)
def test_bad_arguments(given, error, message):
    with pytest.raises(error, match=message):
        PreferenceCollator(**{"objective": "dpo", "pad_token_id": 0, **given})


def without_mask(policy_logps: Tensor, ref_logps: Tensor | None = None) -> Tensor:
    return -policy_logps.sum(1)


LISTS = [
    {"prompt_ids": [1], "completions_ids": [[2]] * size, "ref_logps": [-1] * size}
    for size in (2, 3)
]


@pytest.mark.parametrize(
    ("objective", "rows", "error", "message"),
    [
        ("dpo", [], ValueError, "a batch must have a row at least"),
        ("dpo", [PAIR], ValueError, r"dpo needs the columns ref_chosen_logps, ref_rejected_logps"),
        ("dpo", [{"label": 1}], ValueError, r"columns prompt_ids.*remove_unused_columns=False"),
        ("kto", [{"prompt_ids": [1], "completion_ids": [2], "ref_logps": 0}], ValueError, "label"),
        ("odpo", [PAIR | REFERENCE], ValueError, "odpo needs the columns reward_margin"),
        ("mallows_po", [PAIR | REFERENCE], ValueError, "needs the columns ref_entropy"),
        ("simpo", [PAIR | {"chosen_ids": []}], ValueError, "a prompt of 2 and a response of 0"),
        ("simpo", [PAIR | {"chosen_ids": "text"}], TypeError, "a response must be token ids"),
        (
            "simpo",
            [PAIR | {"prompt_ids": [0.5]}],
            TypeError,
            "a prompt must be a sequence of token",
        ),
        ("simpo", [PAIR | {"prompt_ids": None}], TypeError, "a prompt must be token ids, got None"),
        ("dpo", [PAIR | REFERENCE | {"ref_chosen_logps": None}], ValueError, "hold numbers"),
        (
            "dpo",
            [PAIR | REFERENCE | {"ref_chosen_logps": [-1]}],
            ValueError,
            r"\(1,\) for 3 tokens",
        ),
        (
            "softmax_dpo",
            [LISTS[0] | {"ref_logps": -1}],
            ValueError,
            "ref_logps must hold one value",
        ),
        ("lipo", [LISTS[0] | {"scores": [1]}], ValueError, "scores must hold one value for each"),
        ("lipo", [LISTS[0] | {"completions_ids": []}], ValueError, "got an empty list"),
        (
            Objective(without_mask, unit="list", scope="list"),
            LISTS,
            ValueError,
            "takes no mask; got 2 and 3",
        ),
    ],
)
def test_bad_rows(objective, rows, error, message):
    with pytest.raises(error, match=message):
        collate(objective, *rows)


def test_nothing_is_left_of_a_response():
    with pytest.raises(ValueError, match=r"max_length=2; leave such rows out"):
        collate("simpo", PAIR, max_length=2)
