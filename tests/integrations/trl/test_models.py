# SPDX-License-Identifier: Apache-2.0
"""Whole models with TRL's fused head: batches, and heads that ZeRO-3 partitions."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations import trl as integration
from fastpref.integrations.trl import OUTPUTS, LogProbAdapter
from tests.integrations.trl.head_calls import ALL, TILE, V, make_inputs
from tests.integrations.trl.runs import RELEASE

pytestmark = pytest.mark.skipif(RELEASE < (1, 15), reason="TRL puts heads on models from 1.15 on")


def fused_scores(model: Any, labels: Tensor) -> Any:
    ids = torch.arange(10, 10 + labels.numel()).view_as(labels)
    return model(input_ids=ids, labels=labels, fused_lm_head=True)


@pytest.mark.parametrize("compact", [False, True], ids=["every position", "scored positions"])
def test_batch_without_a_label(
    compact: bool, trl_utils: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is a 0 that all of the model is connected to. On a GPU TRL passes no row at all."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact, raising=False)
    model = make_model("phi")
    trl_utils.add_fused_lm_head(model, outputs=ALL)  # before patching: it is looked up at each call
    with integration.patched():
        out = fused_scores(model, torch.full((2, 12), -100))
        out.log_probs.sum().backward()
    assert not any(getattr(out, name).any() for name in OUTPUTS)
    gradients = [value.grad for value in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_compacted_batch_scores_as_a_masked_one(
    trl_utils: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gemma2")
    trl_utils.add_fused_lm_head(model, outputs=ALL)
    labels = torch.randint(0, V, (2, 12)).masked_fill(torch.rand(2, 12) < 0.5, -100)
    with integration.patched():
        masked = fused_scores(model, labels)
        monkeypatch.setattr(trl_utils, "_use_triton", lambda device: True, raising=False)
        compacted = fused_scores(model, labels)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(masked, name), getattr(compacted, name))


@pytest.mark.parametrize("autocast", [False, True])
def test_partitioned_head_is_gathered_again_in_backward(
    autocast: bool, trl_utils: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 weight and bias hold data only inside TRL's gathering context."""
    model = make_model("phi")
    trl_utils.add_fused_lm_head(model)
    head = model.get_output_embeddings()
    labels = torch.randint(0, V, (2, 12)).masked_fill(torch.rand(2, 12) < 0.5, -100)
    trained = [head.weight, head.bias, model.get_input_embeddings().weight]

    def gradients() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = fused_scores(model, labels).log_probs.sum()
        return torch.autograd.grad(loss, trained)

    with integration.patched():
        expected = gradients()
    whole = {value: value.data for value in (head.weight, head.bias)}
    gathered = []

    @contextlib.contextmanager
    def gather(*values: Tensor) -> Iterator[None]:
        assert values[0] is head.weight and values[1] is head.bias
        gathered.append(values)
        for value, data in whole.items():
            value.data = data
        yield
        for value in whole:
            value.data = torch.empty(0)

    deepspeed = sys.modules["transformers.integrations.deepspeed"]
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", gather)
    for value in whole:
        value.data = torch.empty(0)
    with integration.patched():
        again = gradients()
    assert len(gathered) == 2
    assert head.weight.numel() == head.bias.numel() == 0
    assert all(map(torch.equal, again, expected))


def test_without_zero3_nothing_is_gathered(trl_utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context in backward would have the weight cast once more."""
    called: list[Any] = []
    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", lambda *args: called.append(args))
    hidden, weight, _, targets = make_inputs()
    LogProbAdapter.apply(hidden, weight, None, targets, 1.0, TILE)[0].sum().backward()
    assert called == []
