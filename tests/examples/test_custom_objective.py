# SPDX-License-Identifier: Apache-2.0
"""The example's objective on whole logits in plain torch, and its training."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.examples.loading import load, printed


@pytest.fixture(scope="module")
def example() -> Any:
    return load("custom_objective")


def sums(example: Any, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen and rejected responses, from whole logits."""
    logps = model.head(model(ids)[:, :-1]).log_softmax(-1)
    tokens = logps.gather(-1, ids[:, 1:, None])[..., 0][:, example.PROMPT - 1 :]
    return tokens.sum(-1).chunk(2)


def test_as_plain_torch(example: Any) -> None:
    policy = example.Model().double()
    reference = copy.deepcopy(policy)
    for value in reference.parameters():
        torch.nn.init.normal_(value, std=0.3)
    ids, rating = example.make_batch()
    output = example.loss_of(policy, reference, ids, rating)
    chosen, rejected = sums(example, policy, ids)
    with torch.no_grad():
        ref_chosen, ref_rejected = sums(example, reference, ids)
    gain, loss = chosen - ref_chosen, rejected - ref_rejected
    margins = 0.3 * (gain - loss) - rating
    want = (torch.log1p(torch.exp(-margins)) + 0.15 * (-gain).clamp(min=0)).mean()
    assert (gain < 0).any() and (gain > 0).any()
    torch.testing.assert_close(output.loss, want)
    torch.testing.assert_close(output.chosen_rewards, 0.3 * gain.detach())
    leaves = list(policy.parameters())
    for a, b in zip(
        torch.autograd.grad(output.loss, leaves, retain_graph=True),
        torch.autograd.grad(want, leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.heavy
def test_the_loss_falls(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    text = capsys.readouterr().out
    losses, margins = printed(text, "loss"), printed(text, "margin")
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
    assert margins == sorted(margins) and margins[0] == 0
