# SPDX-License-Identifier: Apache-2.0
"""The example's losses against whole logits in plain torch, and its training."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.examples.loading import load


@pytest.fixture(scope="module")
def example() -> Any:
    return load("image_tokens")


class Batch:
    def __init__(self, example: Any) -> None:
        torch.manual_seed(0)
        self.model, self.reference = (example.Model().double() for _ in range(2))
        self.classes = torch.tensor([0, 3, example.NO_CLASS, 0])
        self.tokens = torch.randint(example.VOCABULARY, (4, example.TOKENS))

    def log_ratios(self) -> Tensor:
        """Sums over all tokens, of heads with their bias."""
        sums = []
        for model in (self.model, self.reference):
            logits = model.head(model(self.classes, self.tokens))
            logp = logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]
            sums.append(logp.sum(-1))
        return sums[0] - sums[1].detach()


def compare(got: Tensor, want: Tensor, model: Any) -> None:
    torch.testing.assert_close(got, want)
    leaves = list(model.parameters())
    both = (torch.autograd.grad(one, leaves) for one in (got, want))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_ddo(example: Any) -> None:
    """A weight of each generated row, and rows that beta takes out."""
    batch = Batch(example)
    labels = torch.tensor([True, True, False, False])
    alpha = torch.tensor([1.0, 1.0, 3.0, 6.0], dtype=torch.float64)
    beta = torch.tensor([0.02, 0.0, 0.05, 0.02], dtype=torch.float64)
    given = (batch.model, batch.reference, batch.classes, batch.tokens)
    got = example.ddo(*given, labels, alpha, beta).loss
    z = beta * batch.log_ratios()
    want = torch.where(labels, F.softplus(-z), alpha * F.softplus(z)).mean()
    compare(got, want, batch.model)


def test_dpo(example: Any) -> None:
    batch = Batch(example)
    got = example.dpo(batch.model, batch.reference, batch.classes, batch.tokens).loss
    chosen, rejected = batch.log_ratios().chunk(2)
    compare(got, F.softplus(-0.1 * (chosen - rejected)).mean(), batch.model)


def test_what_is_measured(example: Any) -> None:
    classes = torch.arange(example.HUES)
    rising = example.real(classes, torch.ones(example.HUES, dtype=torch.bool))
    falling = example.real(classes, torch.zeros(example.HUES, dtype=torch.bool))
    assert example.quality(classes, rising) == example.quality(classes, falling) == 1
    assert example.rising_share(rising) == 1 and example.rising_share(falling) == 0
    assert example.quality(classes.flip(0), rising) == 0
    assert example.quality(classes, torch.randint(example.VOCABULARY, rising.shape)) < 0.2


@pytest.mark.slow
@pytest.mark.heavy
def test_it_learns(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    out = capsys.readouterr().out
    rows = re.findall(r"(\w+) +quality ([\d.]+)   rising ([\d.]+)", out)
    found = {name: float(rising) for name, _, rising in rows}
    assert list(found) == ["before", "longer", "DDO", "DPO"]
    assert found["DPO"] > found["DDO"] + 0.08
    (losses,) = re.findall(r"DDO loss ([\d.]+) to ([\d.]+)", out)
    first, last = map(float, losses)
    assert last < first - 0.03
