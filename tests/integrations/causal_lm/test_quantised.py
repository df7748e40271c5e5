# SPDX-License-Identifier: Apache-2.0
"""As QLoRA has it: a frozen base in eight bits under a head in sixteen, with adapters in float32. A
head in eight bits is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpref
from tests.integrations.causal_lm.models import (
    batch,
    check_gradients,
    gradients,
    make,
    refusals,
    scores_of,
)
from tests.integrations.causal_lm.test_adapters import ATTENTION, SAVED, adapted, lora

peft = pytest.importorskip("peft", reason="peft is not installed (extra: fastpref[trl])")


class Int8Linear(nn.Linear):
    """Rows of integers and a scale for each; differentiable in its input alone."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        weight = layer.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), False)

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight.float() * self.scale).to(input.dtype)
        return nn.functional.linear(input, weight)


def quantised(*but: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """All linear layers but those of these names."""
    model = make().to(dtype).requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name not in but:
            model.set_submodule(name, Int8Linear(layer))
    return model


CONFIGS = {
    "attention": ATTENTION,
    "head": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "saved": SAVED,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_full_logits(name: str) -> None:
    """To the last digits with a head in float32, which PEFT's preparation leaves too."""
    wrapped = adapted(quantised("lm_head", dtype=torch.float32), lora(**CONFIGS[name]))
    inputs = batch()
    plain = wrapped(**inputs)
    expected = scores_of(plain.logits, inputs["labels"])["log_probs"]
    wanted = gradients(plain.loss, wrapped)
    output = fastpref.fuse_lm_head(wrapped)(**inputs, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    check_gradients(gradients(output.loss, wrapped), wanted)
    assert refusals(wrapped) == ()


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative to each norm."""
    assert found.keys() == exact.keys()
    return {
        name: float((found[name].double() - value).norm() / value.norm())
        for name, value in exact.items()
        if value.norm() > 0
    }


def scored(head: nn.Module, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """From the head's own outputs: log-probabilities, and the gradients of their mean."""
    hidden = hidden.requires_grad_()
    log_probs = scores_of(head(hidden), labels)["log_probs"]
    mean = log_probs.sum() / (labels[:, 1:] != -100).sum()
    return {"log_probs": log_probs.detach(), **gradients(-mean, head), "hidden": hidden.grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_in_sixteen_bits(name: str) -> None:
    """Its scores and gradients are about as far from float64 as those of its own outputs, in which
    PEFT multiplies by its float32 adapters in float32 and fastpref in the head's sixteen bits."""
    wrapped = adapted(quantised("lm_head"), lora(**CONFIGS[name]))
    fastpref.fuse_lm_head(wrapped)
    inputs, given = batch(rows=8), []
    head = wrapped.get_base_model().get_output_embeddings()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(args[0].detach().requires_grad_())
        return (given[-1],)

    with torch.no_grad():
        wrapped(**inputs, fused_lm_head=True)  # measured
    handle = head.register_forward_pre_hook(keep)
    output = wrapped(**inputs, fused_lm_head=True)
    handle.remove()
    found = {"log_probs": output.log_probs.detach(), **gradients(output.loss, head)}
    found["hidden"] = given[-1].grad
    labels, hidden = inputs["labels"], given[-1].detach()
    plain = scored(head, hidden.clone(), labels)
    exact = scored(head.double(), hidden.double(), labels)
    assert found.keys() == plain.keys() == exact.keys() and refusals(wrapped) == ()
    assert found["hidden"].dtype == torch.bfloat16
    for one, value in exact.items():
        fused, own = ((side[one].double() - value).norm() for side in (found, plain))
        assert fused <= 3 * own <= 0.1 * value.norm(), (one, fused, own, value.norm())


@pytest.mark.parametrize("config", [None, lora(), lora(use_dora=True)], ids=["", "LoRA", "DoRA"])
def test_a_head_in_eight_bits_is_refused(config: Any) -> None:
    """Whatever is wrapped around it."""
    model = quantised()
    if config is not None:
        model = peft.get_peft_model(model, config)
    said = r"of LlamaForCausalLM is quantised \(torch.int8 Parameter\).*llm_int8_skip_modules"
    with pytest.raises(ValueError, match=said):
        fastpref.fuse_lm_head(model)
