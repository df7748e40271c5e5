# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, and what their full logits give."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed (extra: fastpref[trl])")

from fastpref.architectures.configurations import FIRST_WORD, VOCABULARY, tiny

ROWS, LENGTH = 2, 10
SPREAD = 0.3
LAST_WORD = VOCABULARY - 10  # of a vocabulary that is cut too


def make(architecture: str = "llama", seed: int = 0, **fields: Any) -> Any:
    """A causal language model in float32 and train mode, without dropout; its head's logits are
    far from equal."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny(architecture)
    for name, value in fields.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = model.get_output_embeddings()
    for one in (head.weight, head.bias):
        if one is not None:
            torch.nn.init.normal_(one, std=SPREAD)
    return model.train()


def batch(rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """Ids, and labels of which some are not scored."""
    ids = torch.randint(FIRST_WORD, LAST_WORD, (rows, length))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 5] = -100
    return {"input_ids": ids, "labels": labels}


def scores_of(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """Every output of a fused call, in float64 from logits of a plain call."""
    logits, target = logits[:, :-1].double() / temperature, labels[:, 1:]
    mask = target != -100
    logps = logits.log_softmax(-1)
    found = {
        "log_probs": logps.gather(-1, target.clamp(min=0)[..., None])[..., 0],
        "entropy": -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": logps.exp().square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == target,
    }
    return {name: torch.where(mask, one, 0).to(one.dtype) for name, one in found.items()} | {
        "label_mask": mask
    }


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    """Of all parameters that get one."""
    model.zero_grad()
    loss.backward()
    return {
        name: value.grad.clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    largest = max(float(one.abs().max()) for one in expected.values())
    assert largest > 1e-3, "nothing was compared"
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-4,
            atol=2e-6 * max(1.0, largest),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def with_likeliest(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The labels, the last of them the token that the model finds likeliest."""
    labels = inputs["labels"].clone()
    with torch.no_grad():
        labels[:, -1] = model(**inputs).logits[:, -2].argmax(-1)
    return labels


def check_call(model: Any, inputs: dict[str, Tensor], **given: Any) -> Any:
    """A fused call of a fused model against the same of full logits: scores, loss, gradients.
    Returns its output."""
    inputs = {**inputs, "labels": with_likeliest(model, inputs)}
    plain = model(**inputs)
    expected = scores_of(plain.logits, inputs["labels"])
    assert 0 < expected["is_top1"].sum() < expected["label_mask"].sum()
    wanted = gradients(plain.loss, model)
    output = model(**inputs, fused_lm_head=True, outputs=tuple(expected)[:5], **given)
    for name, value in expected.items():
        got = output[name]
        assert got.dtype == (torch.bool if value.dtype == torch.bool else torch.float32)
        torch.testing.assert_close(got.to(value.dtype), value, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-6)
    check_gradients(gradients(output.loss, model), wanted)
    return output


def refusals(model: Any) -> tuple[str, ...]:
    """Why a fused model was scored from full logits."""
    from fastpref.integrations.causal_lm.fuse import STATE

    base = getattr(model, "get_base_model", lambda: model)()
    return vars(base)[STATE].warned
