# SPDX-License-Identifier: Apache-2.0
"""The example's update against every pair by itself, without packing, on whole logits in plain
torch; and its training."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.examples.loading import load, printed


@pytest.fixture(scope="module")
def example() -> Any:
    return load("packed_simpo_accelerate")


@pytest.fixture(autouse=True)
def no_accelerator() -> Iterator[None]:
    """Accelerators of a process share their state."""
    state = pytest.importorskip("accelerate.state", reason="accelerate is not installed")

    def reset() -> None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

    reset()
    yield
    reset()


def mean_logp(example: Any, model: Any, row: Tensor) -> Tensor:
    logps = model(row[None]).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, row[1:, None])[example.PROMPT - 1 :].mean()


def test_an_update_is_one_of_all_pairs(example: Any) -> None:
    """Its learning rate is 1, so that what the weights lose is the gradient."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=example.STEPS)
    model = example.make_model().double()
    windows = [[list(example.make_pairs(count)) for count in (1, 4, 2)] for _ in range(2)]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for window in windows:
        pairs = [pair for batch in window for pair in batch]
        means = [[mean_logp(example, model, row) for row in pair] for pair in pairs]
        margins = torch.stack([2.0 * (chosen - rejected) for chosen, rejected in means]) - 1.0
        want = torch.nn.functional.softplus(-margins).mean()
        leaves = list(model.parameters())
        gradients = torch.autograd.grad(want, leaves)
        before = [value.detach().clone() for value in leaves]
        packed = [example.pack(batch) for batch in window]
        got = example.update(accelerator, model, optimizer, packed)
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-6)
        for old, value, gradient in zip(before, leaves, gradients, strict=True):
            torch.testing.assert_close(old - value.detach(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.heavy
def test_the_loss_falls(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    losses = printed(capsys.readouterr().out, "loss")
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
