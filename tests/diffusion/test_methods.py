# SPDX-License-Identifier: Apache-2.0
"""Objectives that are no function of a log-ratio alone, against their papers' formulas in float64:
values, gradients, hyperparameters of one value a unit, extremes, and what they refuse."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.diffusion import (
    clipped_step_dpo,
    diffusion_orpo,
    dspo,
    mapo,
    negative_aware,
    smoothed_preference_scale,
)
from tests.diffusion import formulas
from tests.diffusion.cases import predictions

B, P = 6, 3
REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.9, 0.1])
BETAS = {
    "mapo": 0.1,
    "dspo": 300.0,  # at its own 0.001 the sigmoid is flat
    "diffusion_orpo": 0.4,
    "negative_aware": 0.7,
}
OURS: dict[str, Callable[..., Any]] = {
    "mapo": lambda p, r, t, **given: mapo(p, t, **given),
    "dspo": dspo,
    "diffusion_orpo": lambda p, r, t, **given: diffusion_orpo(p, t, **given),
    "negative_aware": lambda p, r, t, **given: negative_aware(p, r, t, REWARDS, **given),
}
THEIRS: dict[str, Callable[..., Tensor]] = {
    "mapo": lambda p, r, t, **given: formulas.mapo(p, t, **given),
    "dspo": formulas.dspo,
    "diffusion_orpo": lambda p, r, t, **given: formulas.diffusion_orpo(p, t, **given),
    "negative_aware": lambda p, r, t, **given: formulas.negative_aware(p, r, t, REWARDS, **given),
}
methods = pytest.mark.parametrize("method", list(OURS))


def check(method: str, dtype: torch.dtype, **given: Any) -> None:
    model, ref, target = predictions(B, 2, 4, 5, dtype=dtype)
    model.requires_grad_()
    exact = model.detach().double().requires_grad_()
    found = OURS[method](model, ref, target, **given)
    expected = THEIRS[method](exact, ref, target, **given)
    assert found.losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not any(one.requires_grad for one in found[1:])
    digits = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.losses.double(), expected, rtol=digits, atol=digits * 1e-2)
    upstream = torch.linspace(0.5, 2.0, len(expected), dtype=torch.float64)
    found.losses.backward(upstream.to(found.losses.dtype))
    expected.backward(upstream)
    largest = float(exact.grad.abs().max())
    rounding = max(digits, 4 * torch.finfo(dtype).eps) * largest
    torch.testing.assert_close(model.grad.double(), exact.grad, rtol=0, atol=rounding)


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_numbers(method: str, dtype: torch.dtype) -> None:
    check(method, dtype, beta=BETAS[method])


@methods
def test_defaults(method: str) -> None:
    check(method, torch.float64)


@methods
def test_one_value_a_unit(method: str) -> None:
    """Against a number for each; 0 is no weight."""
    units = B if method == "negative_aware" else P
    values = BETAS[method] * torch.linspace(0.0, 2.0, units, dtype=torch.float64)
    check(method, torch.float64, beta=values)
    given = predictions(B, 7)
    together = OURS[method](*given, beta=values)
    for unit, value in enumerate(values.tolist()):
        if value > 0:
            alone = OURS[method](*given, beta=value)
            for one, other in zip(together, alone, strict=True):
                torch.testing.assert_close(one[unit], other[unit], rtol=1e-12, atol=0)


def test_snr_and_temperature_of_each_pair() -> None:
    tensor = torch.tensor([0.3, 0.5, 2.0], dtype=torch.float64)
    check("mapo", torch.float64, snr=tensor, temperature=100 * tensor)


@methods
def test_gradients_by_differences(method: str) -> None:
    model, ref, target = predictions(B, 3)
    beta = torch.full((B if method == "negative_aware" else P,), BETAS[method]).double()

    def losses(model: Tensor, beta: Tensor) -> Tensor:
        return OURS[method](model, ref, target, beta=beta).losses

    assert torch.autograd.gradcheck(losses, (model.requires_grad_(), beta.requires_grad_()))


@methods
def test_gradients_go_to_the_model_alone(method: str) -> None:
    given = [one.requires_grad_() for one in predictions(B, 5)]
    OURS[method](*given).losses.sum().backward()
    assert given[0].grad is not None and given[1].grad is None and given[2].grad is None


def test_mapo_at_no_error_and_at_large_ones() -> None:
    """The script's form is 0 / 0 at no error, and overflows at large ones."""
    target = torch.zeros(2, 4)
    model = torch.stack((torch.zeros(4), torch.full((4,), 200.0))).requires_grad_()
    found = mapo(model, target)
    assert found.losses.item() == pytest.approx(0.0, abs=1e-6)
    found.losses.sum().backward()
    assert torch.isfinite(model.grad).all()
    # The slope of x / (exp(x) - 1) at 0 is -1/2: 1000 times that, halved by a sigmoid at equal
    # errors.
    even = torch.full((2, 1), 1e-9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(mapo(even, torch.zeros_like(even)).losses.sum(), even)
    want = 2e-9 * (1 + 0.1 * 0.5 * 1000 * 0.5 * 0.5)
    assert float(slope[0]) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("x", [0.0, 1e-12, 1e-3, 0.0999, 0.1001, 1.0, 30.0, 800.0])
def test_bernoulli_s_function(x: float) -> None:
    """By a quotient of float64's expm1, either side of where its series ends."""
    from fastpref.diffusion.methods import _bernoulli

    want = 1.0 if x == 0 else 0.0 if x > 700 else x / math.expm1(x)
    value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    found = _bernoulli(value)
    assert float(found.detach()) == pytest.approx(want, rel=1e-14)
    slope = -0.5 if x < 1e-9 else (want / x - want - want / math.expm1(x)) if x < 700 else 0.0
    (gradient,) = torch.autograd.grad(found, value)
    assert float(gradient) == pytest.approx(slope, rel=1e-9)


def test_orpo_has_the_right_sign() -> None:
    """A chosen sample that is predicted better has the smaller loss, beside its own error."""
    target = torch.zeros(2, 3)
    good = diffusion_orpo(torch.tensor([[0.1] * 3, [0.9] * 3]), target, beta=1.0)
    bad = diffusion_orpo(torch.tensor([[0.1] * 3, [0.0] * 3]), target, beta=1.0)
    assert good.losses < bad.losses
    assert good.chosen_rewards > good.rejected_rewards and bad.chosen_rewards < bad.rejected_rewards
    model = torch.tensor([[0.1] * 3, [0.9] * 3], requires_grad=True)
    diffusion_orpo(model, target, beta=1.0).losses.sum().backward()
    # A descent lowers the chosen error and raises the rejected one.
    assert (model.grad[0] > 0).all() and (model.grad[1] < 0).all()


def test_dspo_without_weight_is_the_error_of_the_chosen() -> None:
    model, ref, target = predictions(B, 9)
    found = dspo(model, ref, target, beta=torch.zeros(P))
    torch.testing.assert_close(found.losses, formulas.errors(model, target)[:P])


def test_negative_aware_at_the_old_policy() -> None:
    """Every sample has the old error; good and bad ones pull in opposite directions."""
    _, old, target = predictions(2, 9)
    model = old.clone().requires_grad_()
    found = negative_aware(model, old, target, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found.losses, formulas.errors(old, target))
    found.losses.sum().backward()
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    torch.testing.assert_close(model.grad, signs * 2 / 9 * (old - target))


RATIOS = torch.tensor([0.02, -0.3, 0.05, 2.0]), torch.tensor([-0.01, 0.01, 0.5, -0.02])


def clipped(chosen: Tensor, rejected: Tensor, beta: Any, clip: Any) -> Tensor:
    bounded = [
        torch.log(
            torch.minimum(torch.maximum(one.double().exp(), one * 0 + 1 - clip), 1 + one * 0 + clip)
        )
        for one in (chosen, rejected)
    ]
    return -formulas.log_sigmoid(beta * (bounded[0] - bounded[1]))


@pytest.mark.parametrize(
    "given",
    [
        {"beta": 0.1, "clip": 0.1},
        {"beta": torch.tensor([0.1, 3.0, 0.0, 1.0]).double(), "clip": 0.2},
        {"beta": 2.0, "clip": torch.tensor([0.1, 0.01, 0.4, 0.9]).double()},
    ],
    ids=["numbers", "beta", "clip"],
)
def test_clipped_step_dpo(given: dict[str, Any]) -> None:
    rows = [one.double().requires_grad_() for one in RATIOS]
    found, expected = clipped_step_dpo(*rows, **given), clipped(*rows, **given)
    torch.testing.assert_close(found.losses, expected)
    ours, theirs = (torch.autograd.grad(one.sum(), rows) for one in (found.losses, expected))
    torch.testing.assert_close(ours, theirs)
    single = clipped_step_dpo(*RATIOS, **given)
    torch.testing.assert_close(single.losses.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert single.losses.dtype == torch.float32 and not single.chosen_rewards.requires_grad


def test_a_clipped_ratio_has_no_gradient() -> None:
    rows = [one.requires_grad_() for one in (torch.tensor([0.2, -0.2]), torch.tensor([0.0, 0.0]))]
    clipped_step_dpo(*rows, clip=0.1).losses.sum().backward()
    assert (rows[0].grad == 0).all() and (rows[1].grad > 0).all()


def test_smoothed_preference_scale() -> None:
    """By a softmax of normalised scores; at equal ones no preference."""
    chosen, rejected = torch.tensor([0.22, 0.25, 0.28]), torch.tensor([0.22, 0.20, 0.12])
    low, high = formulas.PICKSCORE
    scores = torch.stack((chosen, rejected), 1).double()
    share = torch.softmax((scores - low) / (high - low), 1)[:, 0]
    found = smoothed_preference_scale(chosen, rejected, low=low, high=high)
    torch.testing.assert_close(found.double(), 10 * (2 * share - 1), rtol=1e-6, atol=1e-6)
    assert found.dtype == torch.float32 and found[0] == 0
    ends = (torch.tensor([one], dtype=torch.float64) for one in (high, low))
    assert float(smoothed_preference_scale(*ends, low=low, high=high)) == pytest.approx(
        4.62, abs=0.01
    )
    swapped = smoothed_preference_scale(rejected, chosen, low=low, high=high, gamma=5.0)
    torch.testing.assert_close(swapped, -found / 2)


def test_scores_get_no_gradient() -> None:
    scores = [torch.rand(3, requires_grad=True) for _ in range(2)]
    assert not smoothed_preference_scale(*scores, low=0.0, high=1.0).requires_grad


ONE, ROW = torch.ones(2, 3), torch.ones(2)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: mapo(torch.ones(3, 2), torch.ones(3, 2)), ValueError, "even number of rows.*got 3"),
    (lambda: mapo(ONE, ONE[:, :2]), ValueError, "target must be shaped like model_pred"),
    (lambda: mapo(ONE, ONE, beta=0), ValueError, "mapo: beta must be > 0, got 0"),
    (lambda: mapo(ONE, ONE, beta=-ROW[:1]), ValueError, "mapo: beta must be >= 0, got -1"),
    (lambda: mapo(ONE, ONE, snr=0.0 * ROW[:1]), ValueError, "mapo: snr must be > 0, got 0"),
    (
        lambda: mapo(ONE, ONE, temperature="1"),
        TypeError,
        "temperature must be a number, or a tensor of one value a unit, got str",
    ),
    (lambda: mapo(ONE, ONE, beta=ROW), ValueError, r"one value a unit, \(1,\), got \(2,\)"),
    (lambda: dspo(ONE, 1, ONE), TypeError, "ref_pred must be a torch.Tensor, got int"),
    (lambda: dspo(ONE[:1], ONE[:1], ONE[:1]), ValueError, "even number of rows.*got 1"),
    (lambda: dspo(ONE, ONE, ONE, beta=math.nan), ValueError, "dspo: beta must be > 0, got nan"),
    (lambda: diffusion_orpo(ONE, ONE.int()), ValueError, "target must be float16"),
    (lambda: diffusion_orpo(ONE, ONE, beta=-1), ValueError, "diffusion_orpo: beta must be > 0"),
    (lambda: negative_aware(ONE, ONE, ONE, 0.5), TypeError, "rewards must be a torch.Tensor"),
    (
        lambda: negative_aware(ONE, ONE, ONE, ROW[:1]),
        ValueError,
        r"rewards must be of shape \(2,\)",
    ),
    (lambda: negative_aware(ONE, ONE, ONE, 2 * ROW), ValueError, r"must be in \[0, 1\], got 2"),
    (lambda: negative_aware(ONE, ONE, ONE, ROW > 0), ValueError, "real numbers, got torch.bool"),
    (lambda: negative_aware(ONE, ONE[:1], ONE, ROW), ValueError, "old_pred must be shaped like"),
    (lambda: negative_aware(ONE, ONE, ONE, ROW, beta=0), ValueError, "beta must be > 0, got 0"),
    (lambda: clipped_step_dpo(ROW, ROW[:1]), ValueError, r"rejected_log_ratio must be of shape"),
    (lambda: clipped_step_dpo(ONE, ONE), ValueError, r"chosen_log_ratio must be one number a unit"),
    (lambda: clipped_step_dpo(ROW, ROW, clip=1.0), ValueError, r"clip must be in \(0, 1\)"),
    (lambda: clipped_step_dpo(ROW, ROW, clip=0.0 * ROW), ValueError, r"clip must be in \(0, 1\)"),
    (lambda: clipped_step_dpo([1.0], ROW), TypeError, "must be a torch.Tensor, got list"),
    (
        lambda: smoothed_preference_scale(ROW, ROW, low=1.0, high=1.0),
        ValueError,
        "low and high are the ends of a range, got 1.0 and 1.0",
    ),
    (
        lambda: smoothed_preference_scale(ROW, ROW[:1], low=0.0, high=1.0),
        ValueError,
        r"rejected_scores must be of shape \(2,\), got \(1,\)",
    ),
    (
        lambda: smoothed_preference_scale(ROW, ROW, low=0.0, high=1.0, gamma=0.0),
        ValueError,
        "gamma must be > 0",
    ),
    (
        lambda: smoothed_preference_scale(ROW, ROW, low=0.0, high=math.inf),
        ValueError,
        "high must be finite",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
