# SPDX-License-Identifier: Apache-2.0
"""What half-precision predictions cost a log-ratio: published scripts keep the reference's error in
the predictions' dtype, subtract means of squares, and multiply the rounding by beta."""

import pytest
import torch
from torch import Tensor

from fastpref.diffusion import log_ratio

BETA = 5000.0
SHAPE = (64, 4, 32, 32)


def half_precision(model: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    """The model's error in float32, to which a prepared network converts its output; the other
    network's is left in halves."""
    dims = (1, 2, 3)
    of_model = (model.float() - target.float()).pow(2).mean(dims)
    of_ref = (ref - target).pow(2).mean(dims)
    return -0.5 * BETA * (of_model - of_ref).float()


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error", [0.05, 0.15, 0.5])
def test_the_halves_round_as_much_as_the_signal_and_this_does_not(
    error: float, dtype: torch.dtype
) -> None:
    """A pair's logit, of predictions a fifth of a percent apart, as early in a training."""
    generator = torch.Generator().manual_seed(0)
    target, miss, apart = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    ref = (target + error**0.5 * miss).to(dtype)
    model = (target + error**0.5 * miss + 0.002 * apart).float()
    target = target.to(dtype)
    p, r, t = (one.double() for one in (model, ref, target))
    exact = 0.5 * BETA * ((r - t).square() - (p - t).square()).mean((1, 2, 3))
    found = log_ratio(model, ref, target, weight=0.5 * BETA)
    ours, theirs = rms(found - exact), rms(half_precision(model, ref, target) - exact)
    # In units of a logit.
    assert ours < 1e-4
    assert theirs > {torch.float16: 0.1, torch.bfloat16: 0.5}[dtype] * error
    assert ours * 100 < theirs


def test_predictions_that_agree_to_four_digits_keep_them() -> None:
    """Means of squares, subtracted in float32, do not: rounding of 1e-8 where the gap is 1e-7."""
    generator = torch.Generator().manual_seed(0)
    target, miss, apart = torch.randn(3, 8, 16384, generator=generator, dtype=torch.float32)
    ref = target + 0.3 * miss
    model = ref + 1e-6 * apart
    p, r, t = (one.double() for one in (model, ref, target))
    exact = ((r - t).square() - (p - t).square()).mean(1)
    plain = (ref - target).square().mean(1) - (model - target).square().mean(1)
    found = log_ratio(model, ref, target)
    assert rms(found - exact) * 100 < rms(plain - exact)
    assert rms(found - exact) < 1e-5 * rms(exact)
