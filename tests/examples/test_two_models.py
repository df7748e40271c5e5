# SPDX-License-Identifier: Apache-2.0
"""The example's losses against whole logits in plain torch, in float64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.examples.loading import FOLDER, load

IGNORE = -100
H, TEACHER, V = 6, 9, 23


@pytest.fixture(scope="module")
def example():
    return load("two_models")


class Models:
    def __init__(self, padding: int = 4) -> None:
        self.hidden = torch.randn(3, 5, H).double().requires_grad_()
        self.weight = torch.randn(V, H).double().requires_grad_()
        self.other = torch.randn(V, H).double().requires_grad_()
        self.teacher = (
            torch.randn(3, 5, TEACHER).double(),
            torch.randn(V + padding, TEACHER).double(),
        )
        self.target = torch.randint(V, (3, 5))
        self.target[:, :2] = IGNORE
        self.scored = self.target != IGNORE

    def log_probs(self, weight: Tensor, temperature: float = 1.0) -> Tensor:
        return (self.hidden @ weight.t() / temperature).log_softmax(-1)

    def teacher_log_probs(self, temperature: float = 1.0) -> Tensor:
        hidden, weight = self.teacher
        return (hidden @ weight[:V].t() / temperature).log_softmax(-1)

    def logp(self, weight: Tensor) -> Tensor:
        return self.log_probs(weight).gather(-1, self.target.clamp(min=0)[..., None])[..., 0]

    def mean(self, values: Tensor) -> Tensor:
        return torch.where(self.scored, values, 0).sum() / self.scored.sum()


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def compare(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(got, want)
    both = (torch.autograd.grad(one, leaves) for one in (got, want))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_gkd(example) -> None:
    models = Models()
    p, q = models.teacher_log_probs().exp(), models.log_probs(models.weight).exp()
    m = ((p + q) / 2).log()
    want = models.mean((kl(p.log(), m) + kl(q.log(), m)) / 2)
    got = example.gkd(models.hidden, models.weight, models.teacher, models.target)
    compare(got, want, models.hidden, models.weight)


@pytest.mark.parametrize("padding", [0, 7])
def test_mimic(example, padding: int) -> None:
    models = Models(padding)
    divergence = kl(models.teacher_log_probs(), models.log_probs(models.weight))
    want = models.mean(divergence - models.logp(models.weight))
    got = example.mimic(models.hidden, models.weight, models.teacher, models.target)
    compare(got, want, models.hidden, models.weight)


def test_dual_head(example) -> None:
    models = Models()
    logits = (models.hidden @ models.weight.t()).flatten(0, 1)
    nll = F.cross_entropy(logits, models.target.flatten(), ignore_index=IGNORE)
    divergence = kl(models.teacher_log_probs(2.0), models.log_probs(models.other, 2.0))
    got = example.dual_head(
        models.hidden, models.weight, models.other, models.teacher, models.target
    )
    compare(got, nll + 4 * divergence.mean(), models.hidden, models.weight, models.other)


def test_anchored_sft(example) -> None:
    models = Models()
    logp = models.logp(models.weight)
    drift = kl(models.log_probs(models.weight), models.teacher_log_probs())
    want = models.mean(0.3 * drift - logp.exp().detach() * logp)
    base = models.teacher[0], models.teacher[1][:V]
    got = example.anchored_sft(models.hidden, models.weight, base, models.target, alpha=0.3)
    compare(got, want, models.hidden, models.weight)


@pytest.mark.heavy
def test_it_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "two_models.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:14].strip() for line in lines] == ["gkd", "mimic", "dual head", "anchored sft"]
