# SPDX-License-Identifier: Apache-2.0
"""The example's loss on whole logits in plain torch, and its training."""

from typing import Any

import pytest
import torch

from tests.examples.loading import load, printed


@pytest.fixture(scope="module")
def example() -> Any:
    return load("distillation")


def test_as_plain_torch(example: Any) -> None:
    student = example.make_model(16, example.TOKENS + 4, 0.2).double()
    teacher = example.make_model(24, example.TOKENS + 20, 0.2).double()
    ids = torch.randint(example.TOKENS, (3, 9))
    labels = ids.clone()
    labels[:, :4] = example.IGNORE
    labels[1, 7:] = example.IGNORE
    log_q, log_p = (
        model(ids).logits[:, :-1, : example.TOKENS].log_softmax(-1) for model in (student, teacher)
    )
    log_p = log_p.detach()
    both = (log_p.exp() - log_q.exp()) * (log_p - log_q)  # forward plus reverse
    mask = labels[:, 1:] != example.IGNORE
    want = 0.5 * both.sum(-1)[mask].mean()
    got = example.distillation_loss(student, teacher, ids, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)  # norms inside are float32
    leaves = list(student.parameters())
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.heavy
def test_the_divergence_falls(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    losses = printed(capsys.readouterr().out, "divergence")
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
