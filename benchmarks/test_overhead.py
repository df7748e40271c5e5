# SPDX-License-Identifier: Apache-2.0
"""What a call costs beside its products, on the CPU: shapes so small that the products take next to
nothing. ``make bench-compare`` sets it beside the stored baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastpref import (
    linear_divergence,
    linear_logprob,
    objectives,
    preference_loss,
    sequence_logp,
)

B, T, H, V = 8, 4, 8, 32
P = 64  # pairs of an objective head
OTHER = 16 << 20  # numbers, of float32, that other work goes through: more than caches hold
ROUNDS = 200


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(trainable: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(B, T, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=trainable)
    return hidden, weight, torch.randint(V, (B, T))


def _scores(trainable: bool) -> Callable[[], None]:
    hidden, weight, target = inputs(trainable)

    def step() -> None:
        logp = linear_logprob(hidden, weight, target).logp
        torch.autograd.backward(logp, torch.ones_like(logp))

    return step


def _products(trainable: bool) -> Callable[[], None]:
    hidden, weight, _ = inputs(trainable)

    def step() -> None:
        logits = functional.linear(hidden, weight)
        torch.autograd.backward(logits, torch.ones_like(logits))

    return step


@pytest.mark.benchmark(group="yardstick")
def test_a_hundred_operations_of_torch(benchmark: Any) -> None:
    """By which other machines may be compared. One alone takes a microsecond, and half of that
    more or less from run to run."""
    a = torch.randn(B, T)

    def add() -> None:
        for _ in range(100):
            torch.add(a, a)

    benchmark(add)


@pytest.mark.benchmark(group="dispatch")
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_products(benchmark: Any, trainable: bool) -> None:
    """Those of ``linear_logprob`` and its gradient in plain torch, to be taken off its time."""
    benchmark(_products(trainable))


@pytest.mark.benchmark(group="dispatch")
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_linear_logprob(benchmark: Any, trainable: bool) -> None:
    benchmark(_scores(trainable))


@pytest.mark.benchmark(group="dispatch")
def test_linear_logprob_without_gradient(benchmark: Any) -> None:
    hidden, weight, target = inputs()
    with torch.no_grad():
        benchmark(linear_logprob, hidden, weight, target)


@pytest.mark.benchmark(group="dispatch")
def test_linear_divergence(benchmark: Any) -> None:
    hidden, weight, _ = inputs()
    teacher = torch.randn(B, T, H), torch.randn(V, H)
    benchmark(lambda: linear_divergence(hidden, weight, *teacher).sum().backward())


@pytest.mark.benchmark(group="dispatch")
@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_preference_loss(benchmark: Any, name: str) -> None:
    hidden, weight, target = inputs()
    reference = {"ref_logps": torch.zeros(B)} if name == "dpo" else {}
    benchmark(lambda: preference_loss(hidden, weight, target, name, **reference).loss.backward())


def _preference() -> Callable[[], None]:
    (hidden, weight, target), sums = inputs(), torch.zeros(B)
    return lambda: preference_loss(hidden, weight, target, "dpo", ref_logps=sums).loss.backward()


# A call's own time is what it takes less what its products take.
CALLS = {
    "products": lambda: _products(True),
    "products, frozen head": lambda: _products(False),
    "linear_logprob": lambda: _scores(True),
    "linear_logprob, frozen head": lambda: _scores(False),
    "preference_loss": _preference,
}


def _forget(other: Tensor) -> None:
    other.add_(1)


@pytest.mark.benchmark(group="between other work")
@pytest.mark.parametrize("name", CALLS)
def test_between_other_work(benchmark: Any, name: str) -> None:
    """As in a training, whose other work has taken the caches."""
    call, other = CALLS[name](), torch.zeros(OTHER)
    benchmark.pedantic(call, setup=lambda: _forget(other), rounds=ROUNDS, warmup_rounds=5)


@pytest.mark.benchmark(group="sequence sums")
@pytest.mark.parametrize("layout", ["padded", "packed", "ids"])
def test_sequence_logp(benchmark: Any, layout: str) -> None:
    logp = torch.randn(B * T, requires_grad=True)
    arguments: dict[str, Any] = {
        "padded": {},
        "packed": {"cu_seqlens": torch.arange(0, B * T + 1, T)},
        "ids": {"sequence_ids": torch.arange(B).repeat_interleave(T), "num_sequences": B},
    }[layout]
    given = logp.view(B, T) if layout == "padded" else logp
    benchmark(lambda: sequence_logp(given, **arguments).sum().backward(retain_graph=True))


def _pairwise(name: str) -> Callable[[], None]:
    policy = [-100 * torch.rand(P) for _ in range(2)]
    reference = [-100 * torch.rand(P) for _ in range(2)]
    leaves = [one.requires_grad_() for one in policy]
    objective = objectives.get(name)
    given = [*leaves, *(reference if objective.needs_reference else [])]
    lengths = {key: torch.full((P,), 50) for key in objective.extras if key.endswith("lengths")}

    def step() -> None:
        objective(*given, **lengths).losses.mean().backward()

    return step


@pytest.mark.benchmark(group="objective heads")
@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo", "apo_zero", "f_dpo"])
def test_pairs(benchmark: Any, name: str) -> None:
    benchmark(_pairwise(name))


@pytest.mark.benchmark(group="objective heads")
def test_kto(benchmark: Any) -> None:
    logps = (-100 * torch.rand(P)).requires_grad_()
    labels, kto = torch.arange(P) % 2 == 0, objectives.get("kto")
    benchmark(lambda: kto(logps, torch.zeros(P), labels=labels).losses.mean().backward())


@pytest.mark.benchmark(group="objective heads")
def test_grpo(benchmark: Any) -> None:
    logp = (-torch.rand(P, 64)).requires_grad_()
    mask, advantages = torch.ones(P, 64, dtype=torch.bool), torch.randn(P)
    grpo = objectives.get("grpo")
    benchmark(lambda: grpo(logp, mask=mask, advantages=advantages).losses.mean().backward())
