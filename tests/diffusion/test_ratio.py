# SPDX-License-Identifier: Apache-2.0
"""log_ratio against the two squared errors in float64; its gradients, second derivatives, and what
traces or transforms it; what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastpref
from fastpref.diffusion import log_ratio
from fastpref.diffusion.ratio import compared
from tests.diffusion.cases import exact_errors, predictions


def exact_ratio(
    model: Tensor,
    ref: Tensor,
    target: Tensor,
    weight: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    _, of_model, of_ref = exact_errors(model, ref, target, mask, reduction)
    return weight * (of_ref - of_model)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_numbers(dtype: torch.dtype, reduction: Any) -> None:
    """Positive where the model is nearer; 0 weighs a sample out."""
    given = predictions(4, 3, 8, 5, dtype=dtype)
    model, exact = given[0].requires_grad_(), given[0].detach().double().requires_grad_()
    weight = torch.tensor([0.5, 2500.0, 0.0, 3.0], dtype=torch.float32, requires_grad=True)
    exact_weight = weight.detach().double().requires_grad_()
    found = log_ratio(*given, weight=weight, reduction=reduction)
    expected = exact_ratio(exact, *given[1:], exact_weight, reduction=reduction)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
    assert found[2] == 0
    upstream = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=found.dtype)
    found.backward(upstream)
    expected.backward(upstream.double())
    tolerance = {"rtol": max(1e-6, torch.finfo(dtype).eps), "atol": 1e-9}
    torch.testing.assert_close(model.grad.double(), exact.grad, **tolerance)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "weight",
    [3.0, 3, torch.tensor(3.0), torch.full((2,), 3.0).half(), torch.tensor([3, 3])],
    ids=str,
)
def test_weights(weight: Any) -> None:
    given = predictions(2, 30, dtype=torch.float32)
    found = log_ratio(*given, weight=weight)
    assert found.dtype == torch.float32 and found.shape == (2,)
    torch.testing.assert_close(found, 3 * log_ratio(*given))


def test_a_model_that_is_its_reference_gives_exactly_zero() -> None:
    _, ref, target = predictions(3, 50, dtype=torch.bfloat16)
    assert (log_ratio(ref, ref.clone(), target, weight=5000.0) == 0).all()
    assert (log_ratio(target, ref, target) > 0).all() and (log_ratio(ref, target, target) < 0).all()


def test_gradients_go_to_model_and_weight_alone() -> None:
    model, ref, target = (one.requires_grad_() for one in predictions(2, 9))
    weight = torch.ones(2, requires_grad=True)
    log_ratio(model, ref, target, weight=weight).sum().backward()
    assert ref.grad is None and target.grad is None
    assert model.grad is not None and weight.grad is not None
    assert not log_ratio(model.detach(), ref, target).requires_grad


def test_errors_come_with_it() -> None:
    model, ref, target = predictions(2, 3, 20, dtype=torch.float32)
    found = compared(model.requires_grad_(), ref, target, 7.0, "mean", None)
    _, of_model, of_ref = exact_errors(model, ref, target, None, "mean")
    torch.testing.assert_close(found.model_error.double(), of_model)
    torch.testing.assert_close(found.ref_error.double(), of_ref)
    assert not found.ref_error.requires_grad
    (gradient,) = torch.autograd.grad(found.model_error.sum(), model)
    torch.testing.assert_close(gradient, 2 * (model.detach() - target) / 60)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True])])
def test_derivatives(mask: Tensor | None) -> None:
    """First and second, of a nonlinear function of the ratio, by finite differences."""
    model, ref, target = predictions(2, 3, 4)
    weight = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)

    def loss(model: Tensor, weight: Tensor) -> Tensor:
        ratio = log_ratio(model, ref, target, weight=weight, reduction="sum", mask=mask)
        return torch.nn.functional.softplus(-ratio)

    given = (model.requires_grad_(), weight)
    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_gradient_that_is_differentiated_again_is_the_same(
    dtype: torch.dtype, mask: Tensor | None
) -> None:
    """It is formed by other operations."""
    model, ref, target = predictions(2, 3, 4, dtype=dtype)
    found = log_ratio(model.requires_grad_(), ref, target, weight=9.0, mask=mask).square().sum()
    expected, again = (
        torch.autograd.grad(found, model, create_graph=graph, retain_graph=True)[0]
        for graph in (False, True)
    )
    assert again.requires_grad and again.dtype == dtype
    torch.testing.assert_close(again.detach(), expected)


def test_backward_twice() -> None:
    model, ref, target = predictions(2, 40, dtype=torch.bfloat16)
    found = log_ratio(model.requires_grad_(), ref, target, weight=9.0).sum()
    first, second = (torch.autograd.grad(found, model, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)


def test_transforms() -> None:
    """torch.func, forward mode, and a mapped batch of everything."""
    model, ref, target = predictions(3, 2, 10)
    mask = torch.rand(3, 1, 10) < 0.7

    def total(model: Tensor) -> Tensor:
        return log_ratio(model, ref, target, weight=2.0, mask=mask).square().sum()

    leaf = model.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(model), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(model, torch.ones_like(model))
        tangent = forward_ad.unpack_dual(total(dual)).tangent
    torch.testing.assert_close(tangent, expected.sum())
    stacked = [torch.stack((one, 2 * one)) for one in (model, ref, target)]
    mapped = torch.func.vmap(log_ratio)(*stacked)
    for row, scale in zip(mapped, (1, 2), strict=True):
        torch.testing.assert_close(row, log_ratio(*(scale * one for one in (model, ref, target))))


@pytest.mark.heavy
def test_compile() -> None:
    def total(model: Tensor, ref: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-log_ratio(model, ref, target, weight=weight)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (12, 18):
        model, ref, target = predictions(2, 3, size, dtype=torch.float32)
        leaves = model.requires_grad_(), torch.tensor([900.0, 20.0], requires_grad=True)
        expected, found = (one(model, ref, target, leaves[1]) for one in (total, compiled))
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        model = torch.empty(2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        found = log_ratio(model, model.detach(), model.detach(), mask=torch.ones(8))
        found.sum().backward()
        assert found.shape == (2,) and model.grad.shape == model.shape


def test_reachable_after_import_of_the_package() -> None:
    assert fastpref.diffusion.log_ratio is log_ratio
    assert set(fastpref.diffusion.__all__) <= set(dir(fastpref.diffusion))


ONE = torch.ones(2, 3, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model_pred": [1.0]}, TypeError, "model_pred must be a torch.Tensor, got list"),
    ({"ref_pred": None}, TypeError, "ref_pred must be a torch.Tensor, got NoneType"),
    ({"target": ONE.long()}, ValueError, "target must be float16.*got torch.int64; cast"),
    ({"model_pred": ONE.to(torch.complex64)}, ValueError, "model_pred must be.*complex64"),
    ({"model_pred": ONE.sum()}, ValueError, r"model_pred must have shape \(B, ...\)"),
    ({"ref_pred": ONE[:, :2]}, ValueError, r"ref_pred must be shaped like model_pred, \(2, 3, 4\)"),
    ({"target": ONE[:1]}, ValueError, r"target.*got \(1, 3, 4\); expand it"),
    ({"ref_pred": ONE.to("meta")}, ValueError, "ref_pred is on meta and model_pred on cpu"),
    ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ({"reduction": "Mean"}, ValueError, "did you mean 'mean'"),
    ({"weight": -1.0}, ValueError, "weight must be finite and not negative, got -1.0"),
    ({"weight": float("nan")}, ValueError, "weight must be finite and not negative, got nan"),
    (
        {"weight": torch.tensor([1.0, -2.0])},
        ValueError,
        "weight must be finite and not negative, got -2.0",
    ),
    (
        {"weight": torch.tensor([math.nan, 1.0])},
        ValueError,
        "weight must be finite and not negative, got nan",
    ),
    (
        {"weight": torch.tensor([0.0, math.inf])},
        ValueError,
        "weight must be finite and not negative, got inf; 0 weighs",
    ),
    ({"model_pred": ONE.to_sparse()}, ValueError, "model_pred must be a dense tensor.*sparse"),
    (
        {"target": torch.nested.nested_tensor([ONE[0], ONE[0, :2]], layout=torch.jagged)},
        ValueError,
        "target must be a dense tensor, got a nested one.*pad it",
    ),
    ({"weight": torch.ones(3)}, ValueError, r"weight.*\(2,\), one a sample, got shape \(3,\)"),
    ({"weight": torch.ones(2, 1)}, ValueError, r"weight.*\(2,\), one a sample, got shape \(2, 1\)"),
    ({"weight": "1"}, TypeError, "weight must be a number or a tensor.*got str"),
    ({"weight": torch.tensor(True)}, ValueError, "weight must be real numbers, got torch.bool"),
    ({"weight": torch.ones(2, device="meta")}, ValueError, "weight is on meta"),
    ({"mask": 1}, TypeError, "mask must be a torch.Tensor, got int"),
    ({"mask": torch.ones(2)}, ValueError, r"mask must broadcast.*\(2, 3, 4\), got \(2,\)"),
    ({"mask": torch.ones(1, 2, 3, 4)}, ValueError, r"mask must broadcast.*got \(1, 2, 3, 4\)"),
    ({"mask": torch.ones(4, device="meta")}, ValueError, "mask is on meta"),
    ({"mask": torch.ones(4).cfloat()}, ValueError, "mask must be bool or a number.*complex64"),
]


@pytest.mark.parametrize("given, error, message", BAD, ids=[one[2][:40] for one in BAD])
def test_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model_pred": ONE, "ref_pred": ONE, "target": ONE} | given
    with pytest.raises(error, match=message):
        log_ratio(**arguments)
