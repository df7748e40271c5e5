# SPDX-License-Identifier: Apache-2.0
"""What all the trainers have: a model, its reference, batches, and full logits in plain torch."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

PAIRS, LENGTH, VOCABULARY = 3, 10, 61
IGNORED = -100
BETA = 0.3


def make_model(seed: int = 0) -> Any:
    """A causal language model in float64, whose logits are far from equal."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).double().train()


@dataclass(frozen=True)
class Batch:
    """(2 P, T), chosen rows first, padded on the right to different lengths."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.attention_mask.sum(-1)

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def packed(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs (1, N) and labels (1, N) without padding, no row's first token among the labels,
        and boundaries (2 P + 1,)."""
        kept = self.attention_mask.bool()
        positions = torch.arange(LENGTH).expand_as(kept)
        labels = self.labels.clone()
        labels[:, 0] = IGNORED
        boundaries = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))
        inputs = {"input_ids": self.input_ids[kept][None], "position_ids": positions[kept][None]}
        return inputs, labels[kept][None], boundaries


def make_batch() -> Batch:
    torch.manual_seed(7)
    ids = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH))
    lengths = torch.tensor([10, 7, 9, 6, 10, 8])
    attention_mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, :3] = IGNORED
    return Batch(ids, attention_mask, labels)


def by_token(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities of a shifted target from full logits, 0 where none is scored."""
    logps = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return logps * (target != IGNORED)


def plain_log_probs(model: Any, batch: Batch) -> Tensor:
    """(2 P, T - 1)."""
    logits = model(**batch.inputs(), use_cache=False).logits
    return by_token(logits[:, :-1], batch.labels[:, 1:])


def gradient(model: Any, loss: Tensor) -> Tensor:
    """Of all parameters, in one vector."""
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def expect_equal(got: Any, want: Any) -> None:
    """Values of either, float32 or float64. Norms inside the model are float32."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def expect_same_training(model: Any, got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    """Two steps on one model, each (loss, everything else that it returned): equal values, and
    equal gradients, of a size that tells them apart from none."""
    expect_equal(got, want)
    (one, two) = (gradient(model, step[0]) for step in (got, want))
    assert two.norm() > 1e-2
    expect_equal([one], [two])


def plain_dpo(
    pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float = BETA, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and rewards of pairs, as all of these trainers write them."""
    logsigmoid = torch.nn.functional.logsigmoid
    margin = beta * ((pc - pr) - (rc - rr))
    losses = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return losses, beta * (pc - rc).detach(), beta * (pr - rr).detach()
