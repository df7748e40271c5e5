# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers, with and without the patch: the same metrics at every step, the same weights."""

from pathlib import Path
from typing import Any

import pytest

from fastpref.objectives.registry import loss_types
from tests.integrations.trl.runs import ARGUMENTS, RELEASE

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.skipif(RELEASE < (1, 15), reason="older trainers: test_older_trainers.py"),
]

DPO_LOSSES = (*loss_types("pair"), "sft")


@pytest.mark.parametrize(
    "loss",
    [
        DPO_LOSSES[0],
        # Next to three seconds each.
        *(
            pytest.param(one, marks=pytest.mark.heavy if place % 4 == 0 else pytest.mark.slow)
            for place, one in enumerate(DPO_LOSSES[1:])
        ),
    ],
)
def test_dpo_loss(loss: str, make_dpo: Any, compare: Any) -> None:
    smoothing = 0.1 if loss in ("exo_pair", "robust", "aot") else 0.0
    training = compare(lambda: make_dpo(loss_type=loss, label_smoothing=smoothing))
    logged = set(training.logs[0])
    assert {"loss", "grad_norm", "entropy", "logits/chosen", "mean_token_accuracy"} <= logged
    assert {"rewards/margins", "rewards/accuracies", "logps/rejected"} <= logged


@pytest.mark.heavy
def test_dpo_weighted_sum_of_losses(make_dpo: Any, compare: Any) -> None:
    losses = ["sigmoid", "bco_pair", "sft"]
    compare(lambda: make_dpo(loss_type=losses, loss_weights=[0.8, 0.2, 1.0]))


@pytest.mark.heavy
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "cohere", "phi"])
def test_dpo_of_other_heads(architecture: str, make_dpo: Any, compare: Any) -> None:
    """Tied embeddings, a soft cap, a scale of the logits, a bias."""
    compare(lambda: make_dpo(architecture=architecture))


@pytest.mark.heavy
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_dpo_f_divergence(divergence: str, make_dpo: Any, compare: Any) -> None:
    # A small beta: 1 - exp(-x) is large where the policy is far from its reference.
    compare(lambda: make_dpo(f_divergence_type=divergence, f_alpha_divergence_coef=0.5, beta=0.05))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "arguments",
    [{"ld_alpha": 0.3}, {"use_weighting": True}, {"gradient_accumulation_steps": 2}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_dpo_option(arguments: dict[str, Any], make_dpo: Any, compare: Any) -> None:
    compare(lambda: make_dpo(**arguments))


@pytest.mark.heavy
def test_dpo_with_precomputed_reference(make_dpo: Any, compare: Any) -> None:
    compare(lambda: make_dpo(precompute_ref_log_probs=True))


@pytest.mark.heavy
def test_dpo_evaluation(make_dpo: Any, preferences: Any, compare: Any) -> None:
    training = compare(
        lambda: make_dpo(eval_dataset=preferences, eval_strategy="steps", eval_steps=1)
    )
    assert sum("eval_rewards/margins" in entry for entry in training.logs) == 3


@pytest.mark.heavy
@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["head frozen", "head trained"])
def test_dpo_with_lora(saved: list[str] | None, make_dpo: Any, compare: Any) -> None:
    """The reference is the policy without its adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=saved,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    compare(lambda: make_dpo(reference=False, peft_config=config))


@pytest.mark.heavy
def test_dpo_under_autocast(make_dpo: Any, compare: Any) -> None:
    """Both heads multiply in bfloat16; TRL's also rounds the target's logit to it."""
    compare(lambda: make_dpo(bf16=True), rtol=1e-2, atol=5e-2, update=2e-2)


# Each step scores with policy and reference; kto estimates a KL divergence with both once more.
@pytest.mark.heavy
@pytest.mark.parametrize(("loss", "calls"), [("kto", 12), ("apo_zero_unpaired", 6)])
def test_kto(
    loss: str,
    calls: int,
    tmp_path: Path,
    tokenizer: Any,
    labelled: Any,
    make_model: Any,
    compare: Any,
) -> None:
    from trl import KTOConfig, KTOTrainer

    training = compare(
        lambda: KTOTrainer(
            model=make_model(),
            ref_model=make_model(seed=1),
            args=KTOConfig(output_dir=str(tmp_path), **ARGUMENTS, loss_type=loss, beta=0.5),
            train_dataset=labelled,
            processing_class=tokenizer,
        )
    )
    assert training.head_calls == calls


@pytest.mark.heavy
@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_sft(
    loss: str, tmp_path: Path, tokenizer: Any, labelled: Any, make_model: Any, compare: Any
) -> None:
    from trl import SFTConfig, SFTTrainer

    # dft weighs each token with its probability, which is small here.
    arguments = {**ARGUMENTS, "learning_rate": 1.0 if loss == "dft" else 0.1}
    compare(
        lambda: SFTTrainer(
            model=make_model(),
            args=SFTConfig(output_dir=str(tmp_path), **arguments, loss_type=loss, max_length=64),
            train_dataset=labelled.remove_columns("label"),
            processing_class=tokenizer,
        )
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GRPO", {"beta": 0.1, "entropy_coef": 0.1}),
        pytest.param("RLOO", {"beta": 0.1}, marks=pytest.mark.heavy),
    ],
)
def test_sampling(name: str, arguments: dict[str, Any], make_sampling: Any, compare: Any) -> None:
    """A temperature, and of GRPO an entropy bonus whose gradient passes through the head."""
    import trl

    kind, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    compare(lambda: make_sampling(kind, config, **arguments))
