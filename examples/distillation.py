# SPDX-License-Identifier: Apache-2.0
"""A student learns from a teacher whose LM head has another size, without the logits of either:

    python examples/distillation.py

The teacher is wider and its vocabulary padded further; the ids that both heads have take part. A
product for each head and one for each gradient, whatever the divergence. For models of your own,
put ``from_pretrained`` for ``from_config``; the two must share a tokenizer.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fastpref import linear_divergence

TOKENS, LENGTH, IGNORE = 300, 24, -100


def make_model(width: int, vocabulary: int, spread: float) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=spread,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def distillation_loss(student: Any, teacher: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled tokens of half the forward and half the reverse KL divergence."""
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state[:, :-1]
    hidden = student.model(ids).last_hidden_state[:, :-1]
    weight, teacher_weight = student.lm_head.weight, teacher.lm_head.weight
    mask = labels[:, 1:] != IGNORE
    forward, reverse = (
        linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, mask, divergence=kind, vocab_size=TOKENS
        )
        for kind in ("forward_kl", "reverse_kl")
    )
    return (forward + reverse).sum() / (2 * mask.sum())


def main() -> None:
    torch.manual_seed(0)
    student = make_model(width=32, vocabulary=304, spread=0.05)
    teacher = make_model(width=64, vocabulary=320, spread=0.2).eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    ids = torch.randint(TOKENS, (8, LENGTH))
    labels = ids.clone()
    labels[:, :6] = IGNORE  # prompts
    for step in range(20):
        loss = distillation_loss(student, teacher, ids, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == 19:
            print(f"step {step:2}   divergence {loss.item():.4f} nats a token")


if __name__ == "__main__":
    main()
