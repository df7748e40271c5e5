# SPDX-License-Identifier: Apache-2.0
"""A low-rank update of the head against the merged weight in plain torch, in float64."""

import pytest
import torch
from torch import Tensor

from fastpref import (
    ScoringOptions,
    explain,
    linear_divergence,
    linear_logprob,
    objectives,
    preference_loss,
)
from tests.scoring.cases import BACKENDS
from tests.scoring.operations import Operations

N, H, V, RANK, SCALE = 40, 7, 53, 3, 1.7
ROW = V * 8
SCHEDULES = {
    "kept": {},
    "kept in part": {"memory_budget": 30 * ROW},
    "recomputed": {"schedule": "recompute"},
    "least": {"memory_budget": 1},
}


class Updated:
    def __init__(self, dtype=torch.float64, needs=("hidden", "a", "b", "bias")) -> None:
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight, self.bias = draw(N, H), draw(V, H), draw(V)
        self.a, self.b = draw(RANK, H), draw(V, RANK)
        self.target = torch.randint(V, (N,), generator=generator)
        self.target[::5] = -100
        self.hidden[::5] = torch.nan
        self.leaves = [getattr(self, name).requires_grad_() for name in needs]

    @property
    def lora(self) -> tuple[Tensor, Tensor, float]:
        return self.a, self.b, SCALE

    @property
    def merged(self) -> Tensor:
        return self.weight + SCALE * self.b @ self.a

    def logits(self) -> Tensor:
        safe = torch.where(self.target[:, None] < 0, 0, self.hidden)
        return safe @ self.merged.t() + self.bias

    def expected(self) -> Tensor:
        picked = self.logits().log_softmax(-1).gather(-1, self.target.clamp(min=0)[:, None])[:, 0]
        return torch.where(self.target < 0, 0, picked)

    def run(self, **changes):
        arguments = {"bias": self.bias, "lora": self.lora} | changes
        return linear_logprob(self.hidden, self.weight, self.target, **arguments)

    def compare(self, got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got, want)
        upstream = torch.randn(got.shape, dtype=got.dtype)
        actual = torch.autograd.grad(got, self.leaves, upstream)
        for a, b in zip(actual, torch.autograd.grad(want, self.leaves, upstream), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "needs", [("hidden", "a", "b", "bias"), ("a", "b"), ("b",), ("a",), ("hidden",)]
)
def test_as_the_merged_weight(backend: str, schedule: str, needs) -> None:
    updated = Updated(needs=needs)
    options = ScoringOptions(backend=backend, **SCHEDULES[schedule])
    updated.compare(updated.run(options=options).logp, updated.expected())


def test_entropy_and_its_gradient() -> None:
    updated = Updated()
    log_p = updated.logits().log_softmax(-1)
    want = torch.where(updated.target < 0, 0, -(log_p.exp() * log_p).sum(-1))
    updated.compare(updated.run(outputs=("entropy",)).entropy, want)


def test_vocab_range() -> None:
    updated = Updated()
    updated.target.clamp_(max=V - 6)
    picked = updated.logits()[:, : V - 5].log_softmax(-1)
    picked = picked.gather(-1, updated.target.clamp(min=0)[:, None])[:, 0]
    want = torch.where(updated.target < 0, 0, picked)
    updated.compare(updated.run(vocab_range=(0, V - 5)).logp, want)


def test_the_merged_weight_is_never_formed() -> None:
    """One product in, one back, and thin ones for the update: no (V, H) product of B and A."""
    updated = Updated(needs=("hidden", "a", "b"))
    plan = explain(updated.hidden, updated.weight, updated.target, lora=updated.lora)
    with Operations() as operations:
        updated.run(bias=None).logp.sum().backward()
    scored = int((updated.target >= 0).sum())
    wide = 2 * scored * V * (H + RANK)
    thin = 2 * scored * V * RANK + 4 * 2 * scored * H * RANK
    assert 2 * wide <= operations.flop <= 2 * wide + thin
    assert plan.units == pytest.approx(2 + RANK / (H + RANK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_that_of_an_adapter_in_plain_torch(dtype) -> None:
    needs = ("hidden", "a", "b")
    exact, low = Updated(needs=needs), Updated(dtype, needs=needs)
    for name in ("hidden", "weight", "bias", "a", "b"):
        rounded = getattr(low, name).detach().double()
        setattr(exact, name, rounded.requires_grad_(name in needs))
    safe = torch.where(low.target[:, None] < 0, 0, low.hidden)
    eager = safe @ low.weight.t() + SCALE * (safe @ low.a.t()) @ low.b.t()
    picked = (eager.float() + low.bias).log_softmax(-1)
    picked = picked.gather(-1, low.target.clamp(min=0)[:, None])[:, 0]
    picked = torch.where(low.target < 0, 0, picked)
    upstream = torch.randn(N)
    want, plain, got = (
        [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]
        for value, leaves in (
            (exact.expected(), [exact.hidden, exact.a, exact.b]),
            (picked, [low.hidden, low.a, low.b]),
            (low.run().logp, [low.hidden, low.a, low.b]),
        )
    )
    for a, b, x in zip(got, plain, want, strict=True):
        assert a.dtype == b.dtype
        ulp = torch.finfo(a.dtype).eps * x.abs().max()
        assert (a - x).abs().max() <= 2 * (b - x).abs().max() + 2 * ulp


@pytest.mark.parametrize("schedule", ["auto", "recompute", "batches"])
def test_preference_loss(schedule: str) -> None:
    """The reference is the head without its update, or one with its own."""
    updated = Updated()
    hidden = updated.hidden.detach().view(8, 5, H).requires_grad_()
    updated.leaves[0] = hidden
    target = updated.target.view(8, 5)
    other = (torch.randn(2, H).double(), torch.randn(V, 2).double(), 0.5)

    def sums(weight: Tensor) -> tuple[Tensor, ...]:
        safe = torch.where(target[..., None] < 0, 0, hidden)
        log_probs = (safe @ weight.t() + updated.bias).log_softmax(-1)
        picked = log_probs.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return torch.where(target < 0, 0, picked).sum(1).chunk(2)

    options = ScoringOptions(schedule=schedule, memory_budget=16 * ROW)
    for lora, ref_weight in (
        (None, updated.weight),
        (other, updated.weight + 0.5 * other[1] @ other[0]),
    ):
        output = preference_loss(
            hidden,
            updated.weight,
            target,
            "dpo",
            bias=updated.bias,
            lora=updated.lora,
            ref_hidden=hidden.detach(),
            ref_lora=lora,
            options=options,
        )
        reference = (side.detach() for side in sums(ref_weight))
        losses = objectives.dpo(*sums(updated.merged), *reference).losses
        updated.compare(output.loss, losses.mean())


def test_divergence() -> None:
    updated = Updated()
    teacher = torch.randn(N, 4).double(), torch.randn(V, 4).double()
    other = (torch.randn(2, 4).double(), torch.randn(V, 2).double(), 0.5)
    scored = updated.target >= 0
    value = linear_divergence(
        updated.hidden,
        updated.weight,
        *teacher,
        scored,
        student_bias=updated.bias,
        student_lora=updated.lora,
        teacher_lora=other,
    )
    log_p = (teacher[0] @ (teacher[1] + 0.5 * other[1] @ other[0]).t()).log_softmax(-1)
    log_q = updated.logits().log_softmax(-1)
    want = (log_p.exp() * (log_p - log_q)).sum(-1)
    updated.compare(value, torch.where(scored, want, 0))


A, B = torch.zeros(RANK, H), torch.zeros(V, RANK)
BAD = {
    "two": ((A, B), TypeError, r"lora must be \(A, B, scale\), got 2 values"),
    "module": (torch.nn.Linear(2, 2), TypeError, r"lora must be \(A, B, scale\), got Linear"),
    "no tensor": ((A, 3, 1.0), TypeError, "lora's B must be a torch.Tensor"),
    "integers": ((A.long(), B, 1.0), TypeError, "lora's A must be floating point"),
    "scale": ((A, B, "2"), TypeError, "lora's scale must be a number"),
    "infinite": ((A, B, float("nan")), ValueError, "lora's scale must be finite"),
    "transposed": ((A.t(), B, 1.0), ValueError, r"lora must be A \(r, 7\) and B \(53, r\)"),
    "ranks": ((A, B[:, :2], 1.0), ValueError, r"got \(3, 7\) and \(53, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    lora, error, message = BAD[name]
    updated = Updated(torch.float32)
    with pytest.raises(error, match=message):
        updated.run(lora=lora)


def test_a_weight_that_needs_a_gradient_itself() -> None:
    updated = Updated()
    updated.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight must be frozen beside lora"):
        updated.run()
    with torch.no_grad():
        torch.testing.assert_close(updated.run().logp, updated.expected())
