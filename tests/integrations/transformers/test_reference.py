# SPDX-License-Identifier: Apache-2.0
"""Columns of a reference's log-probabilities are those of each response scored by itself."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

import datasets

from fastpref.integrations.transformers import PreferenceCollator, add_reference_logps
from tests.integrations.transformers.trainings import PAD, make_model, make_rows, plain_logps

CUT = 9  # tokens of a row


def bare(unit):
    rows = make_rows(unit)
    return [{n: v for n, v in row.items() if not n.startswith("ref_")} for row in rows]


def expected(model, prompt, completion):
    kept = completion[: CUT - len(prompt)]
    with torch.no_grad():
        return float(plain_logps(model, prompt, kept).sum())


@pytest.mark.parametrize("name", ["dpo", "kto", "plackett_luce"])
def test_columns(name):
    unit = {"dpo": "pair", "kto": "unit", "plackett_luce": "list"}[name]
    rows, model = bare(unit), make_model(1)
    collator = PreferenceCollator(name, pad_token_id=PAD, max_length=CUT)
    dataset = datasets.Dataset.from_list(rows)
    made = add_reference_logps(dataset, model.train(), collator, batch_size=3)
    assert model.training
    assert all(one.grad is None for one in model.parameters())
    for row, given in zip(made, rows, strict=True):
        assert {n: row[n] for n in given} == given
        prompt = row["prompt_ids"]
        if unit == "pair":
            for side in ("chosen", "rejected"):
                whole = expected(model, prompt, row[f"{side}_ids"])
                assert row[f"ref_{side}_logps"] == pytest.approx(whole, rel=1e-5)
        elif unit == "unit":
            whole = expected(model, prompt, row["completion_ids"])
            assert row["ref_logps"] == pytest.approx(whole, rel=1e-5)
        else:
            each = [expected(model, prompt, one) for one in row["completions_ids"]]
            assert row["ref_logps"] == pytest.approx(each, rel=1e-5)
    batch = collator(list(made))
    assert batch["labels"].numbers("ref_logps").shape == batch["labels"].lengths.shape


def test_the_model_is_in_evaluation():
    """Dropout must not be in the reference, and is on again afterwards."""
    model = make_model()
    model.dropout = torch.nn.Dropout()
    modes, forward = [], model.forward
    model.forward = lambda **given: modes.append(model.dropout.training) or forward(**given)
    collator = PreferenceCollator("dpo", pad_token_id=PAD)
    add_reference_logps(datasets.Dataset.from_list(bare("pair")), model.train(), collator)
    assert modes == [False]
    assert model.dropout.training


def test_no_reference_is_taken():
    collator = PreferenceCollator("simpo", pad_token_id=PAD)
    with pytest.raises(ValueError, match="simpo takes no reference; leave add_reference_logps out"):
        add_reference_logps(datasets.Dataset.from_list(bare("pair")), make_model(), collator)
