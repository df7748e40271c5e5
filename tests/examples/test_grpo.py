# SPDX-License-Identifier: Apache-2.0
"""The example's loss on whole logits in plain torch, and its training."""

from typing import Any

import pytest
import torch

from tests.examples.loading import load, printed


@pytest.fixture(scope="module")
def example() -> Any:
    return load("grpo")


def test_as_plain_torch(example: Any) -> None:
    """Some ratios are clipped on either side."""
    model = example.make_model().double()
    ids = torch.randint(1, example.VOCABULARY, (6, example.PROMPT + example.RESPONSE))
    advantages = torch.randn(6).double()
    first = example.PROMPT - 1
    logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    old = logps.detach() + 0.4 * torch.randn_like(logps)
    ratios = (logps - old).exp()[:, first:]
    assert (ratios > 1.2).any() and (ratios < 0.8).any()
    scaled = advantages[:, None] * ratios, advantages[:, None] * ratios.clamp(0.8, 1.2)
    want = -torch.minimum(*scaled).mean(-1).mean()
    got = example.grpo_loss(model, ids, advantages, old).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)  # norms inside are float32
    leaves = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.heavy
def test_the_reward_rises(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    rewards = printed(capsys.readouterr().out, "reward")
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.2
