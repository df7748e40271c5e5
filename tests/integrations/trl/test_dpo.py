# SPDX-License-Identifier: Apache-2.0
"""FastDPOTrainer: objectives, columns, running state, batches without padding, LoRA on the head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import objectives
from fastpref.integrations import trl as integration
from tests.integrations.conftest import WORDS
from tests.integrations.trl.runs import RELEASE, STOCK_MAKES_LOGITS

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.skipif(RELEASE < (1, 15), reason="TRL puts a head on models from 1.15 on"),
    pytest.mark.usefixtures("trl_utils"),
]


@pytest.mark.parametrize(
    ("objective", "of_trl"),
    [
        ({"objective": "dpo"}, {"loss_type": ["sigmoid"]}),
        pytest.param({"objective": "ipo"}, {"loss_type": ["ipo"]}, marks=pytest.mark.slow),
        pytest.param({}, {"loss_type": ["apo_zero", "sft"]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("padding_free", [False, True])
def test_training_is_that_of_trl(
    objective: dict[str, Any],
    of_trl: dict[str, Any],
    padding_free: bool,
    make_dpo: Any,
    compare_trainers: Any,
) -> None:
    ours = {**objective} or of_trl
    more = {"beta": 0.5, "gradient_accumulation_steps": 2}
    training = compare_trainers(
        lambda: make_dpo(**of_trl, **more),
        lambda: make_dpo(integration.FastDPOTrainer, padding_free=padding_free, **ours, **more),
        stock_products=STOCK_MAKES_LOGITS,
    )
    assert {"rewards/margins", "mean_token_accuracy", "entropy"} <= set(training.logs[0])


@pytest.mark.heavy
def test_precomputed_reference_and_evaluation(
    make_dpo: Any, preferences: Any, compare_trainers: Any
) -> None:
    more = {
        "beta": 0.5,
        "precompute_ref_log_probs": True,
        "eval_dataset": preferences,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    compare_trainers(
        lambda: make_dpo(**more),
        lambda: make_dpo(integration.FastDPOTrainer, objective="dpo", **more),
        stock_products=STOCK_MAKES_LOGITS,
    )


def test_packed_rows_reach_the_model_without_padding(make_dpo: Any) -> None:
    trainer = make_dpo(integration.FastDPOTrainer, objective="dpo", padding_free=True)
    assert trainer.args.padding_free and trainer.padding_free
    seen = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch))
    assert seen[-1].shape == (1, batch["attention_mask"].sum())
    assert not (seen[-1] == 0).any()


def test_model_that_lets_packed_rows_see_each_other_is_refused(
    make_dpo: Any, make_model: Any
) -> None:
    """Attention that is causal and nothing else."""
    model = make_model("llama")
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, **given: own(
            *args, **{**given, "attention_mask": None}
        )
    trainer = make_dpo(integration.FastDPOTrainer, objective="dpo", padding_free=True, model=model)
    with pytest.raises(RuntimeError, match="keeps packed rows apart by their positions"):
        trainer.train()


def test_hyperparameters_and_columns_reach_the_objective(make_dpo: Any, preferences: Any) -> None:
    """A margin for each pair, of the data set."""
    margins = [0.1 * (i + 1) for i in range(len(WORDS))]
    data = preferences.add_column("reward_margin", margins)
    found = make_dpo(integration.FastDPOTrainer, objective="odpo", beta=0.3, train_dataset=data)
    batch = next(iter(found.get_train_dataloader()))
    loss = found.compute_loss(found.model, dict(batch))
    reference = found.compute_ref_log_probs(found.ref_model, batch)
    output = found.model(**{name: value for name, value in batch.items() if name != "labels"})
    margin = batch["labels"].numbers("reward_margin")
    assert len(set(margin.flatten().tolist())) == 4
    logps = output.log_probs.sum(1).chunk(2)
    expected = objectives.odpo(*logps, *reference, reward_margin=margin, beta=0.3).losses.mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("objective", "loaded"), [("simpo", False), ("dpo", True)])
def test_no_reference_is_loaded_for_an_objective_without(
    objective: str, loaded: bool, by_name: bool, make_dpo: Any, make_model: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = str(tmp_path / "model")
    make_model().save_pretrained(path)
    model = path if by_name else AutoModelForCausalLM.from_pretrained(path)
    given = {"objective": objective, "model": model, "reference": False}
    trainer = make_dpo(integration.FastDPOTrainer, **given)
    assert (trainer.ref_model is not None) == loaded
    trainer.train()
    assert trainer.state.global_step == 3


def test_missing_column_is_named(make_dpo: Any) -> None:
    with pytest.raises(ValueError, match="odpo needs the columns reward_margin of the data set"):
        make_dpo(integration.FastDPOTrainer, objective="odpo")


def test_resumed_training_is_the_same_to_the_bit(make_dpo: Any, tmp_path: Path) -> None:
    """With the running mean of rewards, and momentum."""
    more = {
        "objective": "bco_pair",
        "beta": 0.5,
        "optim": "adamw_torch",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
    }
    whole = make_dpo(integration.FastDPOTrainer, **more)
    whole.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    moments = state["stateful_callbacks"]["PreferenceLossState"]["attributes"]["moments"]
    assert moments["chosen"]["updates"] == 2 and moments["chosen"]["mean"] != 0
    resumed = make_dpo(integration.FastDPOTrainer, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    last = [trainer.state.log_history[-2] for trainer in (whole, resumed)]
    assert last[0]["step"] == 4
    assert last[0]["loss"] == last[1]["loss"] and last[0]["grad_norm"] == last[1]["grad_norm"]


def test_lora_on_the_head_trains(make_dpo: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    trainer = make_dpo(
        integration.FastDPOTrainer, objective="dpo", reference=False, peft_config=config
    )
    adapter = trainer.model.get_output_embeddings().lora_B["default"].weight
    trainer.train()
    assert adapter.abs().sum() > 0
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy is its reference


@pytest.mark.heavy
def test_lists_of_token_ids(make_dpo: Any) -> None:
    from datasets import Dataset

    rows = [
        {
            "prompt_ids": [5 + i, 9],
            "completions_ids": [[10 + i, 11, 2], [12, 2], [13 + i, 14, 15, 2]][: 2 + i % 2],
            "scores": [1.0, 0.0, 0.5][: 2 + i % 2],
        }
        for i in range(8)
    ]
    data = Dataset.from_list(rows)
    trainer = make_dpo(integration.FastDPOTrainer, objective="lipo", train_dataset=data)
    trainer.train()
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history[:-1])
    with pytest.raises(ValueError, match="prompt_ids, completions_ids, of token ids; got prompt"):
        make_dpo(integration.FastDPOTrainer, objective="lipo")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"gamma": 1.0}, TypeError, "gamma belongs to an objective"),
        ({"objective": "simpo", "sigma": 1.0}, TypeError, "sigma"),
        ({"objective": "no_such"}, ValueError, "no_such"),
        ({"objective": "simpo", "use_weighting": True}, ValueError, "use_weighting=True does not"),
        ({"objective": "wpo"}, ValueError, "wpo"),
        (
            {"objective": "simpo", "sync_ref_model": True},
            ValueError,
            "sync_ref_model=True does not",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], said: str, make_dpo: Any
) -> None:
    with pytest.raises(error, match=said):
        make_dpo(integration.FastDPOTrainer, **arguments)
