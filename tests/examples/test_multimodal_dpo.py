# SPDX-License-Identifier: Apache-2.0
"""The example's losses against whole logits in plain torch, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.examples.loading import load

IGNORE = -100
P, T, H, TEACHER, V = 3, 7, 5, 8, 19


@pytest.fixture(scope="module")
def example() -> Any:
    return load("multimodal_dpo")


class Models:
    def __init__(self) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        self.policy = draw(2 * P, T, H).requires_grad_(), draw(V, H).requires_grad_()
        self.reference = draw(2 * P, T, H), draw(V, H)
        self.teacher = draw(2 * P, T, TEACHER), draw(V + 4, TEACHER)
        self.target = torch.randint(V, (2 * P, T))
        self.target[:, :4] = IGNORE

    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logp = (hidden @ weight[:V].t()).log_softmax(-1)
        token = logp.gather(-1, self.target.clamp(min=0)[..., None])[..., 0]
        return torch.where(self.target == IGNORE, 0, token).sum(-1)

    def margins(self, reference: tuple[Tensor, Tensor]) -> Tensor:
        gaps = self.sums(*self.policy) - self.sums(*reference)
        return gaps[:P] - gaps[P:]


def compare(got: Tensor, want: Tensor, models: Models) -> None:
    torch.testing.assert_close(got, want)
    both = (torch.autograd.grad(one, models.policy) for one in (got, want))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_da_dpo(example: Any) -> None:
    """Votes by hand: the normal distribution function of each scorer's own standard scores."""
    models = Models()
    gaps = torch.tensor([[0.3, -0.1, 0.5], [2.0, 1.0, -4.0]], dtype=torch.float64)
    votes, right = [], []
    for row in gaps:
        std = ((row - row.mean()) ** 2).mean().sqrt()
        votes.append(torch.distributions.Normal(0.0, 1.0).cdf((row - row.mean()) / std))
        right.append(float((row > 0).double().mean()))
    easy = sum(share / sum(right) * vote for share, vote in zip(right, votes, strict=True))
    want = -F.logsigmoid(0.1 * (1 + easy) * models.margins(models.reference)).mean()
    compare(example.da_dpo(models.policy, models.reference, models.target, gaps).loss, want, models)


def test_teacher_dpo(example: Any) -> None:
    models = Models()
    want = -F.logsigmoid(0.1 * models.margins(models.teacher)).mean()
    compare(example.teacher_dpo(models.policy, models.teacher, models.target).loss, want, models)


def test_evaluation_dpo(example: Any) -> None:
    """And the prefix is not read: NaN there reaches nothing."""
    models = Models()
    nll = -models.sums(*models.policy)[:P] / 3
    want = (-F.logsigmoid(0.1 * models.margins(models.reference)) + nll).mean()
    compare(
        example.evaluation_dpo(models.policy, models.reference, models.target).loss, want, models
    )
    spoilt = models.policy[0].detach().clone()
    spoilt[:, :4] = torch.nan
    output = example.evaluation_dpo(
        (spoilt.requires_grad_(), models.policy[1]), models.reference, models.target
    )
    torch.testing.assert_close(output.loss, want)
    (gradient,) = torch.autograd.grad(output.loss, spoilt)
    assert (gradient[:, :4] == 0).all() and torch.isfinite(gradient).all()


def test_it_runs(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()] == [
        *("da-dpo", "teacher", "evaluation", "with", "without")
    ]
    assert "256" in text.splitlines()[-1]  # 8 rows of 32 tokens, of 2048 positions
