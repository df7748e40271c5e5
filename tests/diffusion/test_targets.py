# SPDX-License-Identifier: Apache-2.0
"""Prediction targets: every conversion among them against data and noise themselves, what errors
weigh, and the gradient of a k that trains."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.diffusion import (
    DATA,
    FLOW,
    NOISE,
    PredictionTarget,
    convert,
    error_weight,
    k_prediction,
    log_ratio,
    velocity,
)
from tests.diffusion.cases import predictions

B = 3
ALPHA = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)
SIGMA = (1 - ALPHA**2).sqrt()
PATHS: dict[str, tuple[Any, Any]] = {
    "variance preserving": (ALPHA, SIGMA),
    "straight": (1 - SIGMA, SIGMA),
    "numbers": (0.8, 0.6),
    "exploding": (1, SIGMA * 9),
}
KINDS = ("noise", "data", "flow", "velocity", "k", "k of each", "own")


def target_of(kind: str, alpha: Any, sigma: Any) -> PredictionTarget:
    return {
        "noise": lambda: NOISE,
        "data": lambda: DATA,
        "flow": lambda: FLOW,
        "velocity": lambda: velocity(alpha, sigma),
        "k": lambda: k_prediction(0.3),
        "k of each": lambda: k_prediction(torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)),
        "own": lambda: PredictionTarget(0.5, 3),
    }[kind]()


def wide(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).expand(B).view(B, 1, 1)


def of(target: PredictionTarget, data: Tensor, noise: Tensor) -> Tensor:
    return wide(target.a) * data + wide(target.b) * noise


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source, target", list(itertools.product(KINDS, KINDS)))
def test_conversions(path: str, source: str, target: str) -> None:
    """Of an exact prediction the exact other one; of a wrong one, errors as much larger as said."""
    alpha, sigma = PATHS[path]
    given, wanted = target_of(source, alpha, sigma), target_of(target, alpha, sigma)
    data, noise, miss = predictions(B, 4, 5)
    noisy = wide(alpha) * data + wide(sigma) * noise
    right = of(given, data, noise)
    found = convert(right, noisy, path=(alpha, sigma), source=given, target=wanted)
    torch.testing.assert_close(found, of(wanted, data, noise), rtol=1e-9, atol=1e-9)
    wrong = convert(right + miss, noisy, path=(alpha, sigma), source=given, target=wanted)
    errors = (wrong - of(wanted, data, noise)).square().sum((1, 2))
    weight = error_weight((alpha, sigma), given, wanted)
    expected = weight * miss.square().sum((1, 2))
    torch.testing.assert_close(errors, expected, rtol=1e-9, atol=1e-12)
    if source == target:
        assert torch.equal(found, right)  # not a rounding away


def test_formulas_of_the_targets() -> None:
    assert [(one.a, one.b) for one in (NOISE, DATA, FLOW)] == [(0, 1), (1, 0), (-1, 1)]
    assert (velocity(0.8, 0.6).a, velocity(0.8, 0.6).b) == (-0.6, 0.8)
    k = k_prediction(0.75)
    assert (k.a, k.b) == (0.75, -0.25)


def test_weights_of_the_papers() -> None:
    """On a straight path errors of the velocity are 1 / (1 - t)^2 those of the noise and 1 / t^2
    those of the data; EDM's weight of its denoiser is that of its network's own target."""
    path = (0.75, 0.25)
    assert error_weight(path, NOISE, FLOW) == pytest.approx(1 / 0.75**2)
    assert error_weight(path, DATA, FLOW) == pytest.approx(1 / 0.25**2)
    assert error_weight(path, FLOW, FLOW) == 1 and isinstance(
        error_weight(path, NOISE, DATA), float
    )
    sigma, of_data = 0.67, 0.5
    scale = math.hypot(sigma, of_data)
    network = PredictionTarget(sigma / (of_data * scale), -of_data / scale)
    edm = (sigma**2 + of_data**2) / (sigma * of_data) ** 2
    assert error_weight((1.0, sigma), DATA, network) == pytest.approx(edm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_conversion_is_in_float32(dtype: torch.dtype) -> None:
    data, noise, _ = predictions(B, 4, 50)
    noisy = (wide(ALPHA) * data + wide(SIGMA) * noise).to(dtype)
    prediction = noise.to(dtype)
    given = {"path": (ALPHA, SIGMA), "source": NOISE, "target": velocity(ALPHA, SIGMA)}
    found = convert(prediction, noisy, **given)
    exact = convert(prediction.double(), noisy.double(), **given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


def test_gradients_reach_predictions_path_and_k() -> None:
    prediction, noisy, _ = predictions(B, 2, 3)
    k = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    leaves = [
        prediction.requires_grad_(),
        noisy.requires_grad_(),
        ALPHA.clone().requires_grad_(),
        k,
    ]

    def velocity_of(prediction: Tensor, noisy: Tensor, alpha: Tensor, k: Tensor) -> Tensor:
        path = (alpha, 1 - alpha)
        return convert(prediction, noisy, path=path, source=k_prediction(k), target=FLOW)

    assert torch.autograd.gradcheck(velocity_of, leaves)


def test_velocity_of_k_has_the_derivative_of_the_paper() -> None:
    """With x_t = t x + (1 - t) n and D = t + k - 2 t k:  v = ((1 - 2k) x_t + u) / D, of x - n, and
    dv/dk = (-2 x_t D - ((1 - 2k) x_t + u)(1 - 2t)) / D^2."""
    u, noisy, _ = predictions(1, 6)
    t, at = 0.3, 0.7
    k = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    found = convert(u, noisy, path=(t, 1 - t), source=k_prediction(k), target=FLOW)
    divisor = t + at - 2 * t * at
    top = (1 - 2 * at) * noisy + u
    torch.testing.assert_close(-found, top / divisor)
    derivative = torch.autograd.functional.jacobian(
        lambda k: -convert(u, noisy, path=(t, 1 - t), source=k_prediction(k), target=FLOW), k
    )
    expected = (-2 * noisy * divisor - top * (1 - 2 * t)) / divisor**2
    torch.testing.assert_close(derivative, expected)


def test_k_trains_through_the_weight_of_a_log_ratio() -> None:
    """The errors of velocities, of predictions of k's own target."""
    model, ref, target = predictions(B, 8)
    path = (ALPHA, 1 - ALPHA)

    def loss(k: Tensor) -> Tensor:
        weight = 40 * error_weight(path, k_prediction(k), FLOW)
        ratios = log_ratio(model, ref, target, weight=weight, reduction="sum")
        return torch.nn.functional.softplus(-ratios).sum()

    k = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (k,))
    loss(k).backward()
    assert k.grad is not None and k.grad != 0


HALF = torch.ones(2, 3)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"path": (0.0, 1.0)}, ValueError, "D = alpha b - sigma a must not be 0, got alpha 0, sigma 1"),
    (
        {"path": (torch.tensor([1.0, 0.0]), 1)},
        ValueError,
        r"must not be 0, got alpha of shape \(2,\)",
    ),
    ({"path": (1.0, 0.0), "source": DATA}, ValueError, "D = alpha b - sigma a must not be 0"),
    ({"path": 0.5}, TypeError, r"path must be the pair \(alpha, sigma\), got 0.5"),
    ({"path": ("a", 1)}, TypeError, "path's alpha must be a number or a tensor.*got str"),
    ({"path": (math.nan, 1)}, ValueError, "path's alpha must be finite, got nan"),
    ({"path": (1, torch.ones(2, 1))}, ValueError, r"path's sigma must.*got \(2, 1\)"),
    ({"path": (torch.ones(3), 1)}, ValueError, r"path's alpha must.*\(2,\), one a sample.*\(3,\)"),
    ({"path": (torch.ones(3), torch.ones(2))}, ValueError, "of one number of samples"),
    ({"source": "noise"}, TypeError, "source must be a PredictionTarget, got str; NOISE"),
    ({"target": (1, 0)}, TypeError, "target must be a PredictionTarget, got tuple"),
    ({"noisy": HALF[:1]}, ValueError, "noisy must be shaped like prediction"),
    ({"prediction": HALF.int()}, ValueError, "prediction must be float16"),
]


@pytest.mark.parametrize("given, error, message", BAD, ids=[one[2][:40] for one in BAD])
def test_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"prediction": HALF, "noisy": HALF, "path": (0.8, 0.6), "source": NOISE}
    arguments |= {"target": DATA} | given
    with pytest.raises(error, match=message):
        convert(**arguments)
    about_weight = {"path", "source", "target"} & set(given) and "3," not in message
    if about_weight:
        with pytest.raises(error, match=message):
            error_weight(arguments["path"], arguments["source"], arguments["target"])


@pytest.mark.parametrize("a", [None, "k", True, torch.ones(2, 2), torch.tensor(True), math.inf])
def test_targets_are_of_numbers(a: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="a must be"):
        PredictionTarget(a, 1)
