# SPDX-License-Identifier: Apache-2.0
"""Prompts that chosen and rejected share: the scores, gradients and trainings of padded rows, or a
refusal."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations import trl as integration
from tests.integrations.trl.runs import RELEASE, STOCK_MAKES_LOGITS

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')

from fastpref.architectures.configurations import FIRST_WORD
from fastpref.integrations.trl.heads import add_fused_lm_head
from fastpref.integrations.trl.prefix_sharing import PREFIX_SHARING, sharing_supported
from tests.integrations.causal_lm.models import LAST_WORD, check_gradients, gradients, make

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.skipif(RELEASE < (1, 15), reason="TRL puts a head on models from 1.15 on"),
    pytest.mark.usefixtures("trl_utils"),
]


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Of three pairs, tokens of the prompt and in all, chosen and rejected.
PROMPTS, LENGTHS = (9, 1, 12), ((16, 20), (7, 4), (14, 13))


def pairs(prompts: Any = PROMPTS, lengths: Any = LENGTHS, side: str = "right") -> dict[str, Tensor]:
    """Chosen rows, then rejected ones."""
    torch.manual_seed(5)
    width = max(max(both) for both in lengths)
    shape = 2 * len(prompts), width
    ids = torch.full(shape, FIRST_WORD)
    mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for i, (prompt, both) in enumerate(zip(prompts, lengths, strict=True)):
        start = torch.randint(FIRST_WORD, LAST_WORD, (prompt,))
        for j, length in enumerate(both):
            row = torch.randint(FIRST_WORD, LAST_WORD, (length,))
            row[: min(prompt, length)] = start[:length]
            at, begin = i + j * len(prompts), 0 if side == "right" else width - length
            ids[at, begin : begin + length], mask[at, begin : begin + length] = row, 1
            labels[at, begin + prompt : begin + length] = row[prompt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def model_of(architecture: str, attention: str = "sdpa") -> Any:
    model = make(architecture).eval()
    model.set_attn_implementation(attention)
    return model


def shapes_seen(model: Any) -> list[torch.Size]:
    """Grows by the shape of the ids of each call of the backbone."""
    seen: list[torch.Size] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, given: seen.append((args[0] if args else given["input_ids"]).shape),
        with_kwargs=True,
    )
    return seen


def compare_forms(model: Any, batch: dict[str, Tensor]) -> list[torch.Size]:
    """Outputs and gradients of both forms; shapes of what the backbone was then given."""
    add_fused_lm_head(model, outputs=OUTPUTS)
    expected = model(**batch, fused_lm_head=True)
    weights = torch.randn(expected.log_probs.shape)
    loss = (weights * expected.log_probs).sum() + (weights * expected.entropy).sum()
    expected_gradients = gradients(loss, model)
    add_fused_lm_head(model, outputs=OUTPUTS, form=PREFIX_SHARING)
    model(**batch, fused_lm_head=True)  # measured and checked
    seen = shapes_seen(model)
    found = model(**batch, fused_lm_head=True)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5)
    loss = (weights * found.log_probs).sum() + (weights * found.entropy).sum()
    check_gradients(gradients(loss, model), expected_gradients)
    return seen


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen2", "sdpa"),
        ("gpt2", "sdpa"),  # learned positions
        pytest.param("gpt2", "eager", marks=pytest.mark.slow),
        pytest.param("phi", "sdpa", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "sdpa", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "eager", marks=pytest.mark.slow),
    ],
)
def test_scores_and_gradients_are_those_of_padded_rows(architecture: str, attention: str) -> None:
    seen = compare_forms(model_of(architecture, attention), pairs())
    # A prompt once, but for its last token.
    assert seen == [(3, 16 + 20 - (9 - 1))]


@pytest.mark.parametrize(
    ("prompts", "lengths", "side", "width"),
    [
        (PROMPTS, LENGTHS, "left", 28),  # positions of llama are relative
        ((0, 2), ((5, 4), (6, 6)), "right", 11),  # no prompt
        ((6, 6), ((6, 6), (9, 8)), "right", 12),  # completions cut off: nothing scored
        ((6, 6), ((5, 6), (9, 8)), "right", 12),  # and a part of one prompt
    ],
    ids=str,
)
def test_any_rows(prompts: Any, lengths: Any, side: str, width: int) -> None:
    seen = compare_forms(model_of("llama"), pairs(prompts, lengths, side))
    assert seen[0][1] == width


@pytest.mark.parametrize(
    ("arguments", "of_trl"),
    [
        ({"objective": "dpo"}, {"loss_type": ["sigmoid"]}),
        pytest.param({}, {"loss_type": ["apo_zero", "sft"]}, marks=pytest.mark.slow),
        pytest.param({}, {"precompute_ref_log_probs": True}, marks=pytest.mark.slow),
        pytest.param({}, {"ld_alpha": 0.5, "use_weighting": True}, marks=pytest.mark.heavy),
    ],
    ids=str,
)
def test_training_is_that_of_trl(
    arguments: dict[str, Any],
    of_trl: dict[str, Any],
    make_dpo: Any,
    preferences: Any,
    compare_trainers: Any,
) -> None:
    """With micro-batches, evaluation, and completions that are cut off."""
    more = {
        "architecture": "qwen2",
        "eval_dataset": preferences,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "max_length": 20,
    }
    fast = {"prefix_sharing": True, **(arguments or of_trl)}
    compare_trainers(
        lambda: make_dpo(**of_trl, **more),
        lambda: make_dpo(integration.FastDPOTrainer, **fast, **more),
        stock_products=STOCK_MAKES_LOGITS,
    )


@pytest.mark.parametrize("objective", [{}, {"objective": "dpo"}], ids=str)
@pytest.mark.heavy
def test_lora_whose_reference_is_the_model_without_it(
    objective: dict[str, str], make_dpo: Any, compare_trainers: Any
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    more = {"reference": False, "peft_config": config, "gradient_checkpointing": True}
    compare_trainers(
        lambda: make_dpo(**more),
        lambda: make_dpo(integration.FastDPOTrainer, prefix_sharing=True, **objective, **more),
        stock_products=STOCK_MAKES_LOGITS,
    )


def test_policy_and_reference_run_a_prompt_once(make_dpo: Any) -> None:
    trainer = make_dpo(integration.FastDPOTrainer, prefix_sharing=True)
    seen = [shapes_seen(trainer.model), shapes_seen(trainer.ref_model)]
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch))
    mask, completion = batch["attention_mask"], batch["completion_mask"]
    lengths = torch.stack(mask.sum(1).chunk(2))
    prompts = (mask - completion).sum(1).chunk(2)[0]
    expected = (len(prompts), int((lengths.sum(0) - prompts + 1).max()))
    assert [shapes[-1] for shapes in seen] == [expected, expected]


@pytest.mark.parametrize(
    ("architecture", "attention", "said"),
    [
        ("mistral", "sdpa", "has sliding_window=64"),
        ("gemma3_text", "sdpa", "has sliding_attention"),
        ("qwen3_next", "sdpa", "has linear_attention"),
        ("gpt_neo", "eager", "has local attention"),
        ("bloom", "eager", "takes no position_ids"),
        ("llama", "flash_attention_2", "given no mask of any two tokens"),
    ],
)
def test_model_that_is_known_not_to_is_refused(
    architecture: str, attention: str, said: str, make_dpo: Any
) -> None:
    model = make(architecture)
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=f"prefix_sharing=True does not go .*{said}.*Set|set"):
        make_dpo(integration.FastDPOTrainer, prefix_sharing=True, model=model)


@pytest.mark.parametrize("kept", ["attention_mask", "position_ids"])
def test_model_that_makes_something_else_of_masks_or_positions_is_refused(kept: str) -> None:
    model = model_of("gpt2" if kept == "position_ids" else "llama")
    own, places = model.base_model.forward, kept

    def forward(*args: Any, **given: Any) -> Any:
        return own(*args, **{**given, places: None})

    model.base_model.forward = forward
    add_fused_lm_head(model, form=PREFIX_SHARING)
    with pytest.raises(RuntimeError, match=r"follows a mask and positions.*away from those of pad"):
        model(**pairs(), fused_lm_head=True)


def test_model_that_raises_is_refused() -> None:
    model = model_of("xlm", "eager")
    add_fused_lm_head(model, form=PREFIX_SHARING)
    with pytest.raises(RuntimeError, match=r"does not: it raised AssertionError.*Set prefix_shari"):
        model(**pairs(), fused_lm_head=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"padding_free": True}, r"got both.*padding_free=False"),
        ({"objective": "lipo"}, "lipo takes each list by itself"),
        ({"model": "mixtral"}, r"router_aux_loss_coef=0\.001.*router_aux_loss_coef=0\.0"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(
    arguments: dict[str, Any], said: str, make_dpo: Any
) -> None:
    if "model" in arguments:
        arguments = {"model": make(arguments["model"], sliding_window=None)}
    with pytest.raises(ValueError, match=said):
        make_dpo(integration.FastDPOTrainer, prefix_sharing=True, **arguments)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"pixel_values": torch.zeros(6, 3)}, "got input_ids, .*pixel_values.*Set prefix_sharing"),
        ({"past_key_values": ()}, "past_key_values"),
        ({"input_ids": None}, "joins input_ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_batches_of_anything_else_are_refused(more: dict[str, Any], said: str) -> None:
    model = model_of("llama")
    add_fused_lm_head(model, form=PREFIX_SHARING)
    with pytest.raises(ValueError, match=said):
        model(**{**pairs(), **more}, fused_lm_head=True)


def test_rows_that_are_no_pairs_are_refused() -> None:
    model = model_of("llama")
    add_fused_lm_head(model, form=PREFIX_SHARING)
    batch = {name: value[:5] for name, value in pairs().items()}
    with pytest.raises(ValueError, match=r"takes pairs.*got 5 rows"):
        model(**batch, fused_lm_head=True)


@pytest.mark.slow
def test_every_architecture_is_right_or_refused() -> None:
    """At more tokens than a window that a configuration names under another name."""
    from fastpref.architectures.sweep import names

    right = []
    for name in names():
        try:
            model = make(name).eval()
            add_fused_lm_head(model)
            batch = pairs((20, 9), ((40, 33), (30, 20)))
            expected = model(**batch, fused_lm_head=True).log_probs
        except Exception:  # that cannot be built or run from ids alone
            continue
        if sharing_supported(model) is not None:
            continue
        add_fused_lm_head(model, form=PREFIX_SHARING)
        try:
            found = model(**batch, fused_lm_head=True).log_probs
        except RuntimeError as error:
            assert "prefix_sharing=True needs a model that" in str(error)
            continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)
        right.append(name)
    assert len(right) > 75 and {"llama", "qwen2", "qwen3", "gemma", "gpt2", "qwen3_moe"} <= {*right}
