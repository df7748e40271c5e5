# SPDX-License-Identifier: Apache-2.0
"""Trainers that make no logits against the trainers of TRL that do: the same metrics at every
step, the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.integrations import trl as integration
from tests.integrations.conftest import WORDS
from tests.integrations.trl.runs import ARGUMENTS, distinct_letters

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]

Make = Callable[..., Any]  # (class of trainer, arguments of its config) -> trainer


@pytest.fixture
def of_pairs(tmp_path: Path, tokenizer: Any, preferences: Any, make_model: Any) -> Make:
    """A trainer without a reference model, of pairs, or of triples where it takes them."""

    def make(trainer: Any, config: Any, architecture: str = "llama", **arguments: Any) -> Any:
        model = arguments.pop("model", None)
        more = {name: arguments.pop(name) for name in ("peft_config",) if name in arguments}
        dataset = preferences
        if config.__name__ == "TPOConfig":
            gold = [f" {WORDS[i - 2]}." for i in range(len(WORDS))]
            dataset = preferences.add_column("reference", gold)
        settings = {**ARGUMENTS, "beta": 0.5, "max_length": 64, **arguments}
        if config.__name__ != "TPOConfig":
            settings["max_prompt_length"] = 32
            if not hasattr(config, "max_prompt_length"):
                settings.pop("max_prompt_length")
        return trainer(
            model=make_model(architecture) if model is None else model,
            args=config(output_dir=str(tmp_path), **settings),
            train_dataset=dataset,
            eval_dataset=dataset if "eval_strategy" in arguments else None,
            processing_class=tokenizer,
            **more,
        )

    return make


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("llama", {}),
        pytest.param("gemma2", {}, marks=pytest.mark.slow),
        pytest.param("phi", {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param("llama", {"eval_strategy": "steps", "eval_steps": 1}, marks=pytest.mark.slow),
    ],
)
def test_orpo(
    architecture: str, arguments: dict[str, Any], of_pairs: Make, compare_trainers: Any
) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    training = compare_trainers(
        lambda: of_pairs(ORPOTrainer, ORPOConfig, architecture, **arguments),
        lambda: of_pairs(integration.FastORPOTrainer, ORPOConfig, architecture, **arguments),
    )
    assert {"nll_loss", "log_odds_ratio", "logits/chosen"} <= set(training.logs[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss_type": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 0.3, "label_smoothing": 0.1},
        pytest.param({"loss_type": "simpo", "alpha": 0.2}, marks=pytest.mark.heavy),
        pytest.param({"loss_type": "simpo", "cpo_alpha": 0.0}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "sigmoid"}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "hinge"}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "ipo"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_cpo(arguments: dict[str, Any], of_pairs: Make, compare_trainers: Any) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    training = compare_trainers(
        lambda: of_pairs(CPOTrainer, CPOConfig, **arguments),
        lambda: of_pairs(integration.FastCPOTrainer, CPOConfig, **arguments),
    )
    assert {"nll_loss", "rewards/margins", "logits/rejected"} <= set(training.logs[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        pytest.param({"loss_type": "tpo-l", "tpo_alpha": 0.0}, marks=pytest.mark.heavy),
        pytest.param({"loss_type": "tpo-l", "label_smoothing": 0.1}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "hinge"}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "ipo"}, marks=pytest.mark.slow),
        pytest.param({"eval_strategy": "steps", "eval_steps": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tpo(arguments: dict[str, Any], of_pairs: Make, compare_trainers: Any) -> None:
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    training = compare_trainers(
        lambda: of_pairs(TPOTrainer, TPOConfig, **arguments),
        lambda: of_pairs(integration.FastTPOTrainer, TPOConfig, **arguments),
    )
    assert {"entropy", "mean_token_accuracy", "logps/chosen"} <= set(training.logs[0])


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("ipo", marks=pytest.mark.slow)])
def test_online_dpo(
    loss: str,
    tmp_path: Path,
    tokenizer: Any,
    preferences: Any,
    make_model: Any,
    compare_trainers: Any,
) -> None:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    def make(trainer: Any) -> Any:
        return trainer(
            model=make_model(),
            ref_model=make_model(seed=1),
            reward_funcs=distinct_letters,
            args=OnlineDPOConfig(
                output_dir=str(tmp_path),
                **ARGUMENTS,
                loss_type=loss,
                beta=0.5,
                max_new_tokens=8,
                max_length=24,
            ),
            train_dataset=preferences.select_columns("prompt"),
            processing_class=tokenizer,
        )

    training = compare_trainers(
        lambda: make(OnlineDPOTrainer), lambda: make(integration.FastOnlineDPOTrainer)
    )
    assert {"objective/kl", "rewards/margins", "logps/chosen"} <= set(training.logs[0])


@pytest.mark.slow
def test_lora_on_the_head(of_pairs: Make, compare_trainers: Any) -> None:
    peft = pytest.importorskip("peft")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    compare_trainers(
        lambda: of_pairs(ORPOTrainer, ORPOConfig, peft_config=config),
        lambda: of_pairs(integration.FastORPOTrainer, ORPOConfig, peft_config=config),
    )


def test_encoder_decoder_is_refused(of_pairs: Make) -> None:
    from transformers import T5Config, T5ForConditionalGeneration
    from trl.experimental.cpo import CPOConfig

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=259, **sizes))
    with pytest.raises(ValueError, match="model is an encoder-decoder"):
        of_pairs(integration.FastCPOTrainer, CPOConfig, model=model)


def test_model_without_a_head_is_refused(of_pairs: Make, make_model: Any) -> None:
    from trl.experimental.orpo import ORPOConfig

    with pytest.raises(ValueError, match="has no output head"):
        of_pairs(integration.FastORPOTrainer, ORPOConfig, model=make_model().base_model)


def test_metrics_of_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="compute_metrics is given logits"):
        integration.FastTPOTrainer(model=torch.nn.Linear(1, 1), compute_metrics=print)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="FastPPOTrainer"):
        integration.FastPPOTrainer  # noqa: B018
