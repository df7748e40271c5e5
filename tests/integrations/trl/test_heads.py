# SPDX-License-Identifier: Apache-2.0
"""Models whose head TRL has wrong or refuses, in TRL's trainers with ``fix_heads``."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations import trl as integration
from tests.integrations.trl.runs import RELEASE

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.skipif(RELEASE < (1, 15), reason="TRL puts a head on models from 1.15 on"),
]
VOCABULARY = 259


def capped_model(seed: int = 0) -> Any:
    """Of the family of recurrent_gemma, whose cap TRL does not see."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    torch.manual_seed(seed)
    config = RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        lru_width=24,
        logits_soft_cap=0.5,
        block_types=["recurrent"],
        pad_token_id=0,
        w_init_variance_scale=1.0,
        initializer_range=0.25,
    )
    return RecurrentGemmaForCausalLM(config)


def log_probs_of_logits(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def put_by_trl(model: Any, **arguments: Any) -> None:
    """As TRL's trainers call it: the name is looked up in their module."""
    import trl.trainer.dpo_trainer

    trl.trainer.dpo_trainer.add_fused_lm_head(model, **arguments)


def test_log_probs_are_those_of_logits(trl_utils: Any) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 12))
    model = capped_model().eval()
    expected = log_probs_of_logits(model, ids)
    put_by_trl(model)
    wrong = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    assert (wrong - expected).abs().max() > 1e-2
    model = capped_model().eval()
    with integration.patched(fix_heads=True):
        put_by_trl(model)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_output_has_trl_form(trl_utils: Any, make_model: Any) -> None:
    """All of TRL's fields, for a model that TRL has right; and a copy of the model has its own."""
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    ids = torch.randint(3, VOCABULARY, (2, 12))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    stock, model = make_model("cohere").eval(), make_model("cohere").eval()
    put_by_trl(stock, temperature=0.7, outputs=outputs)
    with integration.patched(fix_heads=True):
        put_by_trl(model, temperature=0.7, outputs=outputs)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for more in ({}, {"num_items_in_batch": 5}, {"labels": torch.full_like(ids, -100)}):
        call = {"input_ids": ids, "labels": labels, "fused_lm_head": True, **more}
        expected, found = stock(**call), duplicate(**call)
        assert type(found) is type(expected)
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        assert found.mean_logits.requires_grad is False
    assert torch.equal(duplicate(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_unpatched_trainers_put_trl_heads(trl_utils: Any) -> None:
    import trl.trainer.dpo_trainer as trainer

    own, layer = trainer.add_fused_lm_head, trainer.BaseTunerLayer
    integration.patch()
    assert trainer.add_fused_lm_head is own
    integration.patch(fix_heads=True)
    integration.patch(fix_heads=True)
    assert trainer.add_fused_lm_head is not own and trainer.BaseTunerLayer is not layer
    integration.unpatch()
    assert trainer.add_fused_lm_head is own and trainer.BaseTunerLayer is layer
    integration.patch()
    with integration.patched(fix_heads=True):
        assert trainer.add_fused_lm_head is not own
    assert trainer.add_fused_lm_head is own
    assert trl_utils._ChunkedLogProbFunction is integration.LogProbAdapter


def test_dpo_trains_a_model_that_trl_has_wrong(trl_utils: Any, make_dpo: Any) -> None:
    with integration.patched(fix_heads=True):
        trainer = make_dpo(model=capped_model(), reference=capped_model(seed=1))
        batch = next(iter(trainer.get_train_dataloader()))
        found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        trainer.train()
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    own = capped_model(seed=1).eval()
    logits = own(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = (expected * mask).sum(1)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-4)
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history[:-1])


def test_dpo_trains_lora_on_the_head(trl_utils: Any, make_dpo: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make_dpo(reference=False, peft_config=config)
    with integration.patched(fix_heads=True):
        trainer = make_dpo(reference=False, peft_config=config)
        ids = torch.randint(3, VOCABULARY, (2, 12))
        trainer.model.eval()
        found = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        expected = log_probs_of_logits(trainer.model, ids)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        adapters = [
            value for name, value in trainer.model.named_parameters() if "lm_head.lora" in name
        ]
        before = [value.detach().clone() for value in adapters]
        trainer.train()
    assert len(before) == 2
    assert not any(map(torch.equal, before, adapters))


def test_a_float32_head_is_refused(trl_utils: Any, make_model: Any) -> None:
    with (
        integration.patched(fix_heads=True),
        pytest.raises(ValueError, match="cast_lm_head_to_fp32=True is not known"),
    ):
        put_by_trl(make_model(), cast_lm_head_to_fp32=True)
