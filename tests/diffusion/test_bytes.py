# SPDX-License-Identifier: Apache-2.0
"""Bytes that both passes move for each element, counted by operator, and the memory they keep."""

import pytest
import torch
from torch import Tensor

from fastpref import _extension
from fastpref.diffusion import backends, log_ratio
from tests.diffusion.cases import BACKENDS, predictions
from tests.scoring import traffic

ELEMENTS = 4 * 16384
compiled = pytest.mark.skipif(
    _extension.ops_unavailable_reason() is not None, reason="the operators are not built"
)


def moved(call, monkeypatch: pytest.MonkeyPatch) -> float:
    operators = torch.ops.fastpref
    # Both go over each tensor once.
    own = {operators.squared_errors.default, operators.error_gradient_.default}
    monkeypatch.setattr(traffic, "ONE_PASS", traffic.ONE_PASS | own)
    # The second is of the tests alone: NaN in what is new.
    free = {torch.ops.aten.empty_like.default, torch.ops.aten.fill_.Scalar}
    monkeypatch.setattr(traffic, "ALLOCATIONS", traffic.ALLOCATIONS | free)
    with traffic.Traffic(matrix=ELEMENTS // 64) as counted:
        call()
    assert counted.of_rows < 512
    return counted.of_matrices / ELEMENTS


@compiled
@pytest.mark.parametrize(
    "dtypes, forward, backward",
    [
        ((torch.bfloat16,) * 3, 6, 6),
        ((torch.float32,) * 3, 12, 12),
        # A prepared network's output, a half-precision reference and target.
        ((torch.float32, torch.float16, torch.float16), 8, 10),
    ],
    ids=["bf16", "fp32", "mixed"],
)
def test_the_least(
    dtypes: tuple[torch.dtype, ...],
    forward: int,
    backward: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three tensors read; two read, and one written. With metrics, and a weight that trains."""
    model, ref, target = (
        one.to(dtype) for one, dtype in zip(predictions(4, 16384), dtypes, strict=True)
    )
    weight = torch.ones(4, requires_grad=True)
    model.requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first = moved(
            lambda: found.append(log_ratio(model, ref, target, weight=weight)), monkeypatch
        )
    assert first == forward
    large = {one.data_ptr() for one in kept if one.numel() > 4}
    assert large == {model.data_ptr(), target.data_ptr()}
    upstream = torch.ones(4)
    second = moved(lambda: found[0].backward(upstream), monkeypatch)
    # What an operator changes counts as read too, and the gradient is written alone.
    assert second - model.itemsize == backward


class Counted:
    """A backend that counts how often it is called."""

    def __init__(self, name: str) -> None:
        self.backend, self.calls = BACKENDS[name], []

    def squared_errors(self, *given):
        self.calls.append("forward")
        return self.backend.squared_errors(*given)

    def error_gradient(self, *given):
        self.calls.append("backward")
        return self.backend.error_gradient(*given)


@pytest.mark.parametrize("needs", [True, False])
def test_one_pass_forward_and_one_backward(needs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted("plain")
    monkeypatch.setattr(backends, "of", lambda *given: counted)
    model, ref, target = predictions(2, 3, 40)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = log_ratio(model.requires_grad_(needs), ref, target, weight=weight)
    found.sum().backward()
    assert counted.calls == ["forward", "backward"][: 1 + needs]
