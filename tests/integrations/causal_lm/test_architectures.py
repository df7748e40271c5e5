# SPDX-License-Identifier: Apache-2.0
"""A fused call of representative architectures: scores, loss and every gradient are those of the
model's own logits, and none is scored from them."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
from tests.integrations.causal_lm.models import batch, check_call, make, refusals, scores_of

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0},  # and tied
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.7},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
    "xlstm": {"output_logit_soft_cap": 2.0},
    "phi": {},  # a bias
    "gpt2": {},
    "bert": {},  # dense layers within the head
    "modernbert-decoder": {},
    "mamba": {},  # logits in float32
    "inkling_text": {"unpadded_vocab_size": 155},
    "llama4_text": {},
    "mixtral": {"output_router_logits": True},
}


@pytest.mark.parametrize("architecture", CASES)
def test_as_full_logits(architecture: str) -> None:
    fields = CASES[architecture]
    model = make(architecture, **fields)
    fastpref.fuse_lm_head(model)
    output = check_call(model, batch())
    assert refusals(model) == ()
    if architecture == "mixtral":
        assert output.aux_loss > 0
        assert output.loss > -output.log_probs.sum() / output.label_mask.sum()
    else:
        assert output.aux_loss is None


class Products(TorchDispatchMode):
    """Counts matrix products with the vocabulary in one of their sizes."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            sizes = {*args[-2].shape, *args[-1].shape}
            self.count += self.vocabulary in sizes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "products"), [(True, 2), (False, 3)])
def test_products_with_the_vocabulary(frozen: bool, products: int) -> None:
    model = make("llama")
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    fastpref.fuse_lm_head(model)
    inputs = batch()
    model(**inputs, fused_lm_head=True)  # measured
    with Products(model.config.vocab_size) as counted:
        model(**inputs, fused_lm_head=True).loss.backward()
    assert counted.count == products


def test_measuring_costs_no_product() -> None:
    model = fastpref.fuse_lm_head(make("llama"), check=False)
    with torch.no_grad(), Products(model.config.vocab_size) as counted:
        model(**batch(), fused_lm_head=True)
    assert counted.count == 1


def test_temperature_and_number_of_items() -> None:
    model, inputs = fastpref.fuse_lm_head(make("gemma2", final_logit_softcapping=2.0)), batch()
    expected = scores_of(model(**inputs).logits, inputs["labels"], temperature=0.7)["log_probs"]
    output = model(
        **inputs, fused_lm_head=True, temperature=0.7, num_items_in_batch=torch.tensor(5)
    )
    torch.testing.assert_close(output.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, -output.log_probs.sum() / 5)
    by_row = model(**inputs, fused_lm_head=True, temperature=torch.full((2, 1), 0.7))
    torch.testing.assert_close(by_row.log_probs, output.log_probs)


def test_the_three_keys_of_targets() -> None:
    """``fused_labels`` where there are no ``labels``; ``shift_labels`` are not shifted again."""
    model, inputs = fastpref.fuse_lm_head(make("llama")), batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    expected = model(**inputs, fused_lm_head=True).log_probs
    for given in (
        {"fused_labels": labels},
        {"fused_labels": torch.full_like(labels, -100), "labels": labels},
    ):
        found = model(input_ids=ids, fused_lm_head=True, **given)
        assert torch.equal(found.log_probs, expected)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    found = model(input_ids=ids, shift_labels=shifted, fused_lm_head=True)
    assert found.log_probs.shape == labels.shape
    torch.testing.assert_close(found.log_probs[:, :-1], expected)
    torch.testing.assert_close(found.loss, -expected.sum() / (labels[:, 1:] != -100).sum())


def test_no_cache_is_filled() -> None:
    model = fastpref.fuse_lm_head(make("llama", use_cache=True))
    caches = []
    model.model.register_forward_hook(lambda *args: caches.append(args[-1].past_key_values))
    model(**batch(), fused_lm_head=True)
    assert caches == [None] * 3  # two runs to measure
    model(**batch())
    assert caches[-1] is not None


def test_positional_arguments() -> None:
    model, inputs = fastpref.fuse_lm_head(make("llama")), batch()
    expected = model(**inputs, fused_lm_head=True)
    found = model(inputs["input_ids"], labels=inputs["labels"], fused_lm_head=True)
    assert torch.equal(found.log_probs, expected.log_probs)


def test_batch_without_a_label() -> None:
    """Its scores are zeros that all of the model is connected to; the mean is NaN and the sum 0, as
    transformers has them."""
    model, inputs = fastpref.fuse_lm_head(make("phi")), batch()
    labels = torch.full_like(inputs["labels"], -100)
    ids = inputs["input_ids"]
    plain = model(input_ids=ids, labels=labels)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True, outputs=("entropy",))
    assert plain.loss.isnan() and output.loss.isnan()
    assert not output.log_probs.any() and not output.entropy.any() and not output.label_mask.any()
    total = model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=3)
    assert total.loss == 0
    total.loss.backward()
    assert all(value.grad is not None and not value.grad.any() for value in model.parameters())


def test_float64_and_bfloat16() -> None:
    inputs = batch()
    exact = scores_of(make("phi").double()(**inputs).logits, inputs["labels"])["log_probs"]
    double = fastpref.fuse_lm_head(make("phi").double())(**inputs, fused_lm_head=True)
    assert double.log_probs.dtype == torch.float64
    torch.testing.assert_close(double.log_probs, exact, rtol=1e-9, atol=1e-9)
    half = fastpref.fuse_lm_head(make("phi").bfloat16())
    output = half(**inputs, fused_lm_head=True)
    assert refusals(half) == () and output.log_probs.dtype == torch.float32
    torch.testing.assert_close(output.log_probs.double(), exact, rtol=0.1, atol=0.1)


def test_under_autocast() -> None:
    model, inputs = fastpref.fuse_lm_head(make("gemma2", final_logit_softcapping=2.0)), batch()
    exact = scores_of(model(**inputs).logits, inputs["labels"])["log_probs"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs, fused_lm_head=True)
    assert refusals(model) == () and output.log_probs.dtype == torch.float32
    torch.testing.assert_close(output.log_probs.double(), exact, rtol=0.1, atol=0.1)
