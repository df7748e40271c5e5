# SPDX-License-Identifier: Apache-2.0
"""What is wrong is said, with the remedy: other collators, models without a fused head, batches
that were cut, objectives of another kind, mixtures of experts without a weight."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import default_data_collator

from fastpref.integrations.causal_lm.output import FusedCausalLMOutput
from fastpref.integrations.transformers import PreferenceCollator, loss_func
from tests.integrations.transformers.trainings import PAD, make_model, make_rows, make_trainer


def labels_of(objective, unit, count=3):
    collator = PreferenceCollator(objective, pad_token_id=PAD)
    return collator(make_rows(unit, count))["labels"]


def outputs_of(rows, **others):
    return FusedCausalLMOutput(log_probs=-torch.rand(rows, 8).requires_grad_(), **others)


@pytest.mark.heavy
@pytest.mark.parametrize("accumulated", [1, 3])
def test_labels_of_tokens(accumulated, tmp_path):
    trainer = make_trainer(
        loss_func("simpo"),
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]} for _ in range(4)],
        tmp_path,
        collator=default_data_collator,
        gradient_accumulation_steps=accumulated,
    )
    with pytest.raises(TypeError, match=r"got Tensor of shape \(2, 3\).*PreferenceCollator\(loss"):
        trainer.train()


@pytest.mark.heavy
def test_no_labels(tmp_path):
    trainer = make_trainer(
        loss_func("simpo"),
        [{"input_ids": [1, 2, 3]} for _ in range(4)],
        tmp_path,
        collator=default_data_collator,
    )
    with pytest.raises(ValueError, match=r"got None: the batch had none; pass.*data_collator="):
        trainer.train()


@pytest.mark.heavy
def test_columns_that_the_trainer_dropped(tmp_path):
    """Of those that are left none is a token."""
    trainer = make_trainer(
        loss_func("kto"), make_rows("unit"), tmp_path, remove_unused_columns=True
    )
    with pytest.raises(ValueError, match=r"prompt_ids, completion_ids.*remove_unused_columns=Fals"):
        trainer.train()


@pytest.mark.heavy
def test_no_fused_head(tmp_path):
    model = make_model()
    del model.forward
    trainer = make_trainer(loss_func("dpo"), make_rows("pair"), tmp_path, model=model)
    with pytest.raises(ValueError, match=r"got logits.*fastpref\.fuse_lm_head\(model\)"):
        trainer.train()


@pytest.mark.parametrize(("name", "unit", "rows"), [("dpo", "pair", 3), ("lipo", "list", 3)])
def test_rows_that_were_cut(name, unit, rows):
    with pytest.raises(ValueError, match=r"got 3.*\"dispatch_batches\": False"):
        loss_func(name)(outputs_of(rows), labels_of(name, unit))


def test_labels_of_another_family():
    with pytest.raises(ValueError, match=r"pair_lengths, ref_logps.*kto takes response_lengths"):
        loss_func("kto")(outputs_of(6), labels_of("dpo", "pair"))


def test_labels_of_another_objective():
    with pytest.raises(ValueError, match=r"odpo needs extras=\{'reward_margin'"):
        loss_func("odpo")(outputs_of(6), labels_of("dpo", "pair"))
    with pytest.raises(ValueError, match=r"ref_chosen_logps is None"):
        loss_func("dpo")(outputs_of(6), labels_of("simpo", "pair"))


def test_data_parallel():
    with pytest.raises(ValueError, match=r"got a tensor \(2, 1\), as under nn.DataParallel"):
        loss_func("dpo")(outputs_of(6), labels_of("dpo", "pair"), torch.full((2, 1), 6))


@pytest.mark.parametrize("name", ["grpo", "wpo", "tdpo", "epsilon_dpo"])
def test_objectives_that_take_more(name):
    from fastpref.objectives import wpo

    with pytest.raises(ValueError, match=r"works on tokens|whole distributions"):
        loss_func(wpo("dpo") if name == "wpo" else name)


def test_hyperparameters():
    with pytest.raises(ValueError, match="beta must be"):
        loss_func("dpo", beta=-1)
    with pytest.raises(TypeError, match="gamma"):
        loss_func("dpo", gamma=1)


def test_load_balancing_loss():
    """Its mean over micro-batches is weighted as that of the losses is."""
    labels, outputs = labels_of("simpo", "pair"), outputs_of(6, aux_loss=torch.tensor(0.8))
    alone = loss_func("simpo")(FusedCausalLMOutput(log_probs=outputs.log_probs), labels, 12)
    loss = loss_func("simpo", aux_loss_coef=0.5)(outputs, labels, 12)
    torch.testing.assert_close(loss, alone + 0.5 * 0.8 * 3 / 12)
    with pytest.raises(ValueError, match=r"aux_loss_coef=model\.config\.router_aux_loss_coef"):
        loss_func("simpo")(outputs, labels, 12)


def test_without_a_count_it_is_the_mean():
    labels, outputs = labels_of("simpo", "pair"), outputs_of(6)
    loss = loss_func("simpo")
    torch.testing.assert_close(loss(outputs, labels), 2 * loss(outputs, labels, 6))
