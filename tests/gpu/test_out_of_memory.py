# SPDX-License-Identifier: Apache-2.0
"""A GPU whose memory runs out for real: the call runs again with less."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastpref import ScoringOptions, linear_logprob, preference_loss
from fastpref.scoring import retry

pytestmark = pytest.mark.gpu
ROWS, H, V = 2048, 256, 65536
EXPONENTIALS = ROWS * V * 2  # 256 MiB


@contextlib.contextmanager
def limited(room: int) -> Iterator[None]:
    """No more memory than is in use, and ``room`` bytes."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    share = (torch.cuda.memory_reserved() + room) / total
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(ROWS, H, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16).mul_(0.2).requires_grad_()
    return hidden, weight, torch.randint(V, (ROWS,), device="cuda")


def score(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = ScoringOptions(schedule="keep", memory_budget=2 * EXPONENTIALS)
    return linear_logprob(hidden, weight, target, options=options).logp.mean()


def prefer(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = ScoringOptions(schedule="batches", memory_budget=2 * EXPONENTIALS)
    rows = hidden.view(8, ROWS // 8, H), weight, target.view(8, ROWS // 8)
    return preference_loss(*rows, "simpo", options=options).loss


@pytest.mark.parametrize("call", [score, prefer])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_with_less_memory_the_same_numbers(
    call, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(retry, "_say", lambda planned, taken: said.append((planned, taken)))
    given = inputs()
    want = call(*given)
    gradients = torch.autograd.grad(want, given[:2])
    assert not said
    room = EXPONENTIALS * 3 // 4
    with limited(room) if when == "forward" else contextlib.nullcontext():
        loss = call(*given)
    # Kept exponentials are in use here, and make room when they are given back.
    with limited(16 << 20) if when == "backward" else contextlib.nullcontext():
        got = torch.autograd.grad(loss, given[:2])
    # One pass has its gradients after forward.
    assert said or (call is prefer and when == "backward")
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    for one, other in zip(got, gradients, strict=True):
        assert (one.double() - other.double()).norm() < 1e-2 * other.double().norm()
