# SPDX-License-Identifier: Apache-2.0
"""Responses and layers of a model of transformers, against its logits and hidden states."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fastpref import fuse_lm_head
from fastpref.diagnostics import spinal
from fastpref.diagnostics.responses import fused, score_responses
from tests.diagnostics.tiny import LAYERS, VOCABULARY, make_batch, make_model, plain_logps


@pytest.mark.parametrize("name", ["labels", "fused_labels", "completion_mask"])
def test_scores_of_any_collator(name: str) -> None:
    model, batch = make_model().train(), make_batch()
    wanted = plain_logps(model, batch)
    given = dict(batch)
    labels = given.pop("labels")
    given[name] = (labels != -100).long() if name == "completion_mask" else labels
    with fused(model) as own:
        found = score_responses(own, given, hidden=True)
    torch.testing.assert_close(found.logps.double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.mask, labels[:, 1:] != -100)
    states = model.eval().model(batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(found.hidden, states.last_hidden_state[:, :-1])


def test_a_model_is_left_as_it_was() -> None:
    model, batch = make_model().train(), make_batch()
    with fused(model) as own:
        score_responses(own, batch, hidden=True)
    assert "forward" not in vars(model) and model.training
    assert not model.lm_head._forward_pre_hooks
    forward = vars(fuse_lm_head(model))["forward"]
    with fused(model) as own:
        score_responses(own, batch)
    assert vars(model)["forward"] is forward


def test_layers_are_read_by_the_models_own_head() -> None:
    model, batch = make_model(), make_batch()
    trace = spinal(model, batch, tail=1.0)
    own = model.double()
    output = own(batch["input_ids"], attention_mask=batch["attention_mask"],
                 output_hidden_states=True)  # fmt: skip
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = batch["labels"][:, 1:] != -100
    # The last of them has been through the norm already.
    read = [own.model.norm(one) for one in output.hidden_states[:-1]] + [output.hidden_states[-1]]
    p = [own.lm_head(one[mask]).softmax(-1) for one in read]
    assert trace.tokens == int(mask.sum()) and len(trace.transport) == LAYERS
    for at in range(LAYERS):
        overlap = (p[at] * p[at + 1]).sqrt().sum(-1).clamp(max=1)
        length = float((2 * overlap.detach().acos()).mean())
        assert trace.transport[at] == pytest.approx(length, rel=1e-4)
    assert len(trace.contraction) == LAYERS + 1
    for at in range(LAYERS):
        states = output.hidden_states[at][mask].detach().numpy()
        sizes = np.log(np.linalg.svd(states, compute_uv=False))
        slope, _ = np.polyfit(np.log(np.arange(1, len(sizes) + 1)), sizes, 1)
        assert trace.contraction[at] == pytest.approx(-slope, rel=1e-3)
    # Of the last layer what is before the norm.
    assert math.isfinite(trace.contraction[-1])


@pytest.mark.parametrize("cap", [None, 2.0])
def test_logits_that_the_model_scales_or_caps(cap: float | None) -> None:
    """Granite divides them, Gemma 2 caps them; neither is told to ``spinal``."""
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "initializer_range": 0.5, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if cap is None:
        config = transformers.GraniteConfig(logits_scaling=4.0, **size)
    else:
        config = transformers.Gemma2Config(final_logit_softcapping=cap, head_dim=8, **size)
    model, batch = transformers.AutoModelForCausalLM.from_config(config).eval(), make_batch()
    trace = spinal(model, batch)
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"],
                   output_hidden_states=True)  # fmt: skip
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = batch["labels"][:, 1:] != -100
    norm, states = model.model.norm, output.hidden_states
    read = [*(norm(one) for one in states[:-1]), states[-1]]
    logits = [model.lm_head(one[mask]).double() for one in read]
    logits = [one / 4 if cap is None else cap * torch.tanh(one / cap) for one in logits]
    torch.testing.assert_close(logits[-1].float(), output.logits[mask], rtol=1e-4, atol=1e-4)
    p = [one.softmax(-1) for one in logits]
    for at, found in enumerate(trace.transport):
        overlap = (p[at] * p[at + 1]).sqrt().sum(-1).clamp(max=1)
        assert found == pytest.approx(float((2 * overlap.acos()).mean()), rel=1e-3)


def test_without_labels_tokens_attended_to_count() -> None:
    model, batch = make_model(), make_batch()
    del batch["labels"]
    assert spinal(model, batch).tokens == int(batch["attention_mask"].sum())
    del batch["attention_mask"]
    assert spinal(model, batch).tokens == batch["input_ids"].numel()


def test_bad_use() -> None:
    batch: dict[str, Any] = make_batch()
    with pytest.raises(TypeError, match="model must be a transformers causal language model"):
        spinal(torch.nn.Linear(2, 2), batch)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="batch must have a token that counts"):
        spinal(make_model(), batch)
    del batch["labels"]
    with pytest.raises(ValueError, match="batch must hold one of fused_labels"):
        score_responses(make_model(), batch)
