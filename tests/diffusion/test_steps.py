# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of steps against torch's normal distribution, and their ratio; the identities
by which a step of a sampler is a squared error of the prediction behind it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.diffusion import log_ratio, step_log_prob, step_log_ratio
from tests.diffusion.cases import predictions

STDS = [0.3, torch.tensor([0.3, 1.7]), torch.tensor(0.05)]
stds = pytest.mark.parametrize("std", STDS, ids=["number", "per sample", "0-dim"])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def normal(sample: Tensor, mean: Tensor, std: float | Tensor, reduction: str) -> Tensor:
    if isinstance(std, Tensor):
        std = std.double().expand(2).view(2, 1, 1)
    density = torch.distributions.Normal(mean.double(), std).log_prob(sample.double()).flatten(1)
    return density.mean(1) if reduction == "mean" else density.sum(1)


@stds
@reductions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_log_prob(std: Any, reduction: Any, dtype: torch.dtype) -> None:
    mean, sample, _ = predictions(2, 3, 40, dtype=dtype)
    mean.requires_grad_()
    exact = mean.detach().double().requires_grad_()
    found, expected = (
        step_log_prob(sample, mean, std=std, reduction=reduction),
        normal(sample, exact, std, reduction),
    )
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    tolerance = {"rtol": max(1e-6, torch.finfo(dtype).eps), "atol": 1e-6}
    torch.testing.assert_close(mean.grad.double(), exact.grad, **tolerance)


@stds
@reductions
def test_log_ratio(std: Any, reduction: Any) -> None:
    mean, ref, sample = (one.requires_grad_() for one in predictions(2, 3, 40))
    found = step_log_ratio(sample, mean, ref, std=std, reduction=reduction)
    expected = normal(sample, mean, std, reduction) - normal(sample, ref, std, reduction)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    found.sum().backward()
    assert ref.grad is None and sample.grad is None
    (gradient,) = torch.autograd.grad(expected.sum(), mean)
    torch.testing.assert_close(mean.grad, gradient, rtol=1e-6, atol=1e-9)


def test_ratio_keeps_the_digits_that_a_difference_loses() -> None:
    """Of a late step, whose std is small, in float32: log-probs of hundreds that agree to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    noise, apart = torch.randn(2, 1, 16384, generator=generator, dtype=torch.float64)
    ref = torch.zeros(1, 16384, dtype=torch.float64)
    sample, mean = 0.02 * noise, (1e-8 * apart).float()
    sample, ref = sample.float(), ref.float()
    exact = step_log_ratio(sample.double(), mean.double(), ref.double(), std=0.02)
    found = step_log_ratio(sample, mean, ref, std=0.02)
    apart = step_log_prob(sample, mean, std=0.02) - step_log_prob(sample, ref, std=0.02)
    assert abs(found - exact) < 1e-5 * abs(exact) and abs(apart - exact) > 0.1 * abs(exact)


def test_std_gets_no_gradient_and_mean_alone_does() -> None:
    mean, ref, sample = (one.requires_grad_() for one in predictions(2, 3, 4))
    std = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (
        step_log_prob(sample, mean, std=std) + step_log_ratio(sample, mean, ref, std=std)
    ).sum().backward()
    assert std.grad is None and sample.grad is None and ref.grad is None
    assert mean.grad is not None


def test_a_step_of_ddim_is_a_squared_error_of_the_noise() -> None:
    """D3PO: mu(m) = A x + B m, and the noise that would have drawn y is (y - A x) / B."""
    model, ref, x = predictions(2, 3, 16)
    alpha, before, eta = 0.6, 0.75, 1.0
    std = eta * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
    a = math.sqrt(before / alpha)
    b = math.sqrt(1 - before - std**2) - math.sqrt(before * (1 - alpha) / alpha)
    y = a * x + b * ref + std * torch.randn(2, 3, 16, dtype=torch.float64)
    steps = step_log_ratio(y, a * x + b * model, a * x + b * ref, std=std)
    implied = (y - a * x) / b
    noise = log_ratio(model, ref, implied, weight=b**2 / (2 * std**2))
    torch.testing.assert_close(steps, noise, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3,)], ids=str)
def test_small(shape: tuple[int, ...]) -> None:
    zero = torch.zeros(shape)
    found = step_log_prob(zero, zero, std=1.0, reduction="sum")
    size = math.prod(shape[1:])
    assert torch.allclose(found, torch.full(shape[:1], -size * math.log(2 * math.pi) / 2))
    assert torch.equal(step_log_ratio(zero, zero, zero, std=1.0), torch.zeros(shape[0]))


ONE = torch.ones(2, 3)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"std": 0}, ValueError, "std must be finite and positive, got 0"),
    ({"std": -0.1}, ValueError, "std must be finite and positive, got -0.1"),
    ({"std": math.inf}, ValueError, "std must be finite and positive, got inf"),
    ({"std": torch.tensor([1.0, 0.0])}, ValueError, "std must be finite and positive, got 0.0"),
    (
        {"std": torch.tensor([1.0, math.nan])},
        ValueError,
        "std must be finite and positive, got nan",
    ),
    (
        {"std": torch.tensor([1.0, math.inf])},
        ValueError,
        "std must be finite and positive, got inf",
    ),
    ({"std": torch.ones(3)}, ValueError, r"std.*\(2,\), one a sample, got shape \(3,\)"),
    ({"std": None}, TypeError, "std must be a number or a tensor.*got NoneType"),
    ({"mean": ONE[:, :2]}, ValueError, r"mean must be shaped like sample, \(2, 3\), got \(2, 2\)"),
    ({"mean": ONE.int()}, ValueError, "mean must be float16"),
    ({"sample": 1.0}, TypeError, "sample must be a torch.Tensor, got float"),
    ({"reduction": "total"}, ValueError, "reduction must be 'mean' or 'sum', got 'total'"),
]


@pytest.mark.parametrize("given, error, message", BAD, ids=[one[2][:40] for one in BAD])
def test_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"sample": ONE, "mean": ONE, "std": 1.0} | given
    with pytest.raises(error, match=message):
        step_log_prob(**arguments)
    with pytest.raises(error, match=message):
        step_log_ratio(**arguments, ref_mean=ONE)
