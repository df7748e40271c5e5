# SPDX-License-Identifier: Apache-2.0
"""Diffusion-DPO of predictions (B, T, H), latents packed as tokens: the loss alone, beside the
products of one head on as many rows. What is gained here shows in no step of a network that
predicts: ``of_a_step`` says how little of one the loss is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import log_ratio
from .experiment import MODES, Candidate, Case, Experiment, Mode, Outcome, bare_products
from .work import Shape

BETA = 5000.0
# Floating-point operations of a training step for each element of a latent: forward and backward of
# the U-Net, and its reference's forward. Of diffusers' UNet2DConditionModel with the settings of
# these two (859,520,964 and 2,567,463,684 parameters), counted by torch.utils.flop_counter.
NETWORKS = {"Stable Diffusion 1.5": 195_925_690, "SDXL": 411_866_437}


class _Predictions(NamedTuple):
    model: Tensor
    ref: Tensor
    target: Tensor


def denoising_experiment(case: Case) -> Experiment:
    work = case.work()
    given = _drawn(case)
    exact = functools.cache(
        lambda: _step(_plain, _Predictions(*(one.double() for one in given)), case.mode)
    )
    ways = {"fastpref": _fused, "plain torch": _plain, "torch.compile": _compiled}
    candidates = [
        Candidate(
            name,
            functools.partial(_step, loss, given, case.mode),
            exact,
            compiles=name == "torch.compile",
        )
        for name, loss in ways.items()
    ]
    return Experiment(bare_products(work, case.mode), candidates)


def _drawn(case: Case) -> _Predictions:
    """As early in a training: both models miss by a third, and are a fifth of a percent apart."""
    shape, dtype = case.shape, getattr(torch, case.dtype)
    generator = torch.Generator(case.device).manual_seed(0)
    sizes = shape.sequences, shape.completion, shape.hidden_size  # rows as the products have
    target, miss, apart = (
        torch.randn(sizes, generator=generator, device=case.device, dtype=torch.float32)
        for _ in range(3)
    )
    ref = target + 0.3 * miss
    return _Predictions(*(one.to(dtype) for one in (ref + 0.002 * apart, ref, target)))


def of_a_step(case: dict[str, Any]) -> str:
    """Of a case's results (cases.measure): what share of a step fastpref's loss is, forward and
    backward; empty of its forward alone, or where it was not timed."""
    own = case["timings"].get("fastpref")
    if own is None or case["mode"] == "forward":
        return ""
    beside = own["ratio"] * 2 * MODES[case["mode"]] * Shape(**case["shape"]).vocab_size
    shares = (f"{beside / operations:.4%} of {name}" for name, operations in NETWORKS.items())
    return (
        f"fastpref's loss in a step of a U-Net on these latents: {', '.join(shares)}, by its "
        "operations, were they as fast as the bare products"
    )


def _step(loss: Callable[..., Tensor], given: _Predictions, mode: Mode) -> Outcome:
    model = given.model.detach().requires_grad_(mode != "forward")
    value = loss(model, given.ref, given.target)
    if mode == "forward":
        return Outcome(value)
    (gradient,) = torch.autograd.grad(value, model)
    return Outcome(value.detach(), (gradient,))


def _of_ratios(ratios: Tensor) -> Tensor:
    chosen, rejected = ratios.chunk(2)
    return F.softplus(rejected - chosen).mean()


def _fused(model: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    return _of_ratios(log_ratio(model, ref, target, weight=BETA / 2))


def _plain(model: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    """With both errors in float32 at least, as careful scripts have them."""
    exact = torch.promote_types(model.dtype, torch.float32)
    errors = [
        F.mse_loss(one.to(exact), target.to(exact), reduction="none").mean((1, 2))
        for one in (model, ref)
    ]
    return _of_ratios(BETA / 2 * (errors[1] - errors[0]))


@functools.cache
def _compiled_plain() -> Callable[..., Tensor]:
    return torch.compile(_plain, dynamic=False)


def _compiled(model: Tensor, ref: Tensor, target: Tensor) -> Tensor:
    return _compiled_plain()(model, ref, target)
