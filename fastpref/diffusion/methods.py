# SPDX-License-Identifier: Apache-2.0
"""Objectives that are no function of a log-ratio alone: of errors without a reference, of how far
model and reference lie apart, of clipped steps.

All stand on squared errors of one prediction to another, so that one or two passes of the same
kernel give value and gradient. Where a pair is compared, chosen samples come first, then the
rejected ones in the same order. R is the mean over all dimensions but the first, err = R[(pred -
target)^2], S the sigmoid, w the chosen and l the rejected sample. Hyperparameters are numbers or
one value a unit.
"""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from ..objectives import PairLosses, UnitLosses
from ..objectives.signature import Domain, Hyperparameter, PerUnit
from ..objectives.terms import clamp, softplus
from .checks import check_predictions, one_a_unit, per_unit
from .errors import squared_error, squared_errors

_BETA = Domain(low=0.0, per_unit=True, zero_per_unit=True)
_POSITIVE = Domain(low=0.0, per_unit=True)
_SHARE = Domain(0.0, 1.0, meaning="how far a ratio may be from 1", per_unit=True)
_UNIT_INTERVAL = Domain(0.0, 1.0, includes=(0.0, 1.0))

Beta: TypeAlias = Annotated[PerUnit, _BETA]
Clip: TypeAlias = Annotated[PerUnit, _SHARE]


def mapo(
    model_pred: Tensor,
    target: Tensor,
    *,
    beta: PerUnit = 0.1,
    snr: PerUnit = 0.5,
    temperature: PerUnit = 1000.0,
) -> PairLosses:
    """Margin-aware preference optimization, without a reference:

        loss = err_w + beta softplus(-temperature (f(snr err_w) - f(snr err_l)))
        f(x) = x / (exp(x) - 1)

    Hong et al. 2024, arXiv:2406.06424, and the defaults of their code, whose f is infinite at an
    error of 0; this one is 1 there. Both f and its slope go to 0 for large errors.

    Args:
        model_pred: (2P, ...), float16, bfloat16, float32 or float64; the only one that gets a
            gradient.
        target: like it.
        beta, snr, temperature: positive; of beta 0 too where there is one value a pair, (P,).

    Returns:
        PairLosses, (P,) each, float64 where a tensor is and float32 otherwise. Rewards are
        beta temperature f(snr err).

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    errors = _errors(model_pred, target)
    chosen, rejected = _halves(errors)
    beta = per_unit("mapo: beta", beta, _BETA, chosen)
    snr = per_unit("mapo: snr", snr, _POSITIVE, chosen)
    temperature = per_unit("mapo: temperature", temperature, _POSITIVE, chosen)
    likely = [temperature * _bernoulli(snr * one) for one in (chosen, rejected)]
    losses = chosen + beta * softplus(likely[1] - likely[0])
    return PairLosses(losses, *((beta * one).detach() for one in likely))


def _bernoulli(x: Tensor) -> Tensor:
    """x / (exp(x) - 1) of x >= 0, the generating function of Bernoulli's numbers."""
    near = x < 0.1
    # Each branch only sees what it is right for: a slope of 0 / 0 times 0 would be NaN. exp(-x) and
    # not exp(x), which overflows.
    far, small = torch.where(near, 1.0, x), torch.where(near, x, 0.0)
    square = small.square()
    series = 1 / 720 - square * (1 / 30240 - square / 1209600)
    series = 1 - small / 2 + square * (1 / 12 - square * series)
    return torch.where(near, series, far * torch.exp(-far) / -torch.expm1(-far))


def dspo(
    model_pred: Tensor, ref_pred: Tensor, target: Tensor, *, beta: PerUnit = 0.001
) -> PairLosses:
    """Direct score preference optimization, as its code for Stable Diffusion 1.5 has it:

        loss = R[((model - target)_w - c (model - ref)_w)^2],   c = beta S(-m)
        m = -beta/2 ((err_w - err_ref_w) - (err_l - err_ref_l))

    Zhu et al., ICLR 2025. The rejected sample counts in c alone, through which a gradient goes too.
    With the moments aa = R[(model - target)^2], bb = R[(model - ref)^2] and the gap g = err -
    err_ref = 2 ab - bb the loss is aa - c g + (c^2 - c) bb, so the square is never formed.

    Args:
        model_pred: (2P, ...), the only one that gets a gradient; dtypes as in ``mapo``.
        ref_pred, target: like it.
        beta: positive, or one value a pair, (P,), which may be 0.

    Returns:
        PairLosses, (P,) each, float64 where a tensor is and float32 otherwise. Rewards are
        -beta/2 (err - err_ref), whose difference is m.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    check_predictions(model_pred=model_pred, ref_pred=ref_pred, target=target)
    gap, error, _ = squared_errors(model_pred, ref_pred, target, reduction="mean")
    gap_chosen, gap_rejected = _halves(gap)
    pairs = gap_chosen.shape[0]
    beta = per_unit("dspo: beta", beta, _BETA, gap_chosen)
    apart = squared_error(model_pred[:pairs], ref_pred[:pairs], reduction="mean")
    rewards = [-0.5 * beta * one for one in (gap_chosen, gap_rejected)]
    share = beta * torch.sigmoid(rewards[1] - rewards[0])
    losses = error[:pairs] - share * gap_chosen + (share.square() - share) * apart
    return PairLosses(losses, *(one.detach() for one in rewards))


def diffusion_orpo(model_pred: Tensor, target: Tensor, *, beta: PerUnit = 0.1) -> PairLosses:
    """Odds-ratio preference optimization on denoising errors, without a reference:

        loss = err_w + beta softplus(-(err_l - err_w))

    After the script of diffusers, whose log odds are err_w - err_l: a log-probability is akin to
    minus an error, so that sign raises the chosen sample's error over the rejected one's.

    Args:
        model_pred: (2P, ...), the only one that gets a gradient; dtypes as in ``mapo``.
        target: like it.
        beta: positive, or one value a pair, (P,), which may be 0.

    Returns:
        PairLosses, (P,) each, float64 where a tensor is and float32 otherwise. Rewards are
        -beta err.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    chosen, rejected = _halves(_errors(model_pred, target))
    beta = per_unit("diffusion_orpo: beta", beta, _BETA, chosen)
    losses = chosen + beta * softplus(chosen - rejected)
    return PairLosses(losses, *((-beta * one).detach() for one in (chosen, rejected)))


def negative_aware(
    model_pred: Tensor, old_pred: Tensor, target: Tensor, rewards: Tensor, *, beta: PerUnit = 1.0
) -> UnitLosses:
    """Negative-aware fine-tuning (DiffusionNFT): towards the target from a good sample, away from
    it, through a mirrored model, from a bad one:

        loss = r R[(old + beta (model - old) - target)^2]
             + (1 - r) R[(old - beta (model - old) - target)^2]

    Zheng et al. 2025, arXiv:2509.16117. With d = model - old and the gap g = err - err_old it is
    err_old + beta (2 r - 1) g + (beta^2 - beta (2 r - 1)) R[d^2]: two passes of the same kernel.

    Args:
        model_pred: (B, ...), the velocity, or what else is predicted; the only one that gets a
            gradient. Dtypes as in ``mapo``.
        old_pred: like it, of the policy that sampled, an average of the model's past.
        target: like it.
        rewards: (B,), r in [0, 1]: in the paper 1/2 + 1/2 clip((reward - mean) / scale, -1, 1)
            over a prompt's samples. Gets no gradient.
        beta: positive, or one value a sample, (B,), which may be 0.

    Returns:
        UnitLosses, (B,) each, float64 where a prediction is and float32 otherwise. Its rewards are
        -beta (err - err_old).

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    check_predictions(model_pred=model_pred, old_pred=old_pred, target=target)
    share = one_a_unit("negative_aware: rewards", rewards, model_pred.shape[:1], model_pred.device)
    _UNIT_INTERVAL.check_values("negative_aware: rewards", share)
    gap, _, of_old = squared_errors(model_pred, old_pred, target, reduction="mean")
    apart = squared_error(model_pred, old_pred, reduction="mean")
    beta = per_unit("negative_aware: beta", beta, _BETA, gap)
    signed = beta * (2 * share.to(gap.dtype) - 1)
    losses = of_old + signed * gap + (beta * beta - signed) * apart
    return UnitLosses(losses, (-beta * gap).detach())


def clipped_step_dpo(
    chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: Beta = 0.1, clip: Clip = 0.1
) -> PairLosses:
    """D3PO on one step of a sampler, whose ratio of densities is clipped:

        loss = softplus(-beta (log clamp(exp(x_w), 1 - clip, 1 + clip)
                               - log clamp(exp(x_l), 1 - clip, 1 + clip)))

    Yang et al. 2023, arXiv:2311.13231. Outside the clip there is no gradient.

    Args:
        chosen_log_ratio, rejected_log_ratio: (P,), x of ``step_log_ratio`` of the same step of two
            trajectories of a prompt; differentiable.
        beta: positive, or one value a pair, (P,), which may be 0.
        clip: in (0, 1), or one value a pair.

    Returns:
        PairLosses, (P,) each, float64 where a tensor is and float32 otherwise. Rewards are beta
        times the clipped log-ratios.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    chosen = one_a_unit("clipped_step_dpo: chosen_log_ratio", chosen_log_ratio)
    rejected = one_a_unit(
        "clipped_step_dpo: rejected_log_ratio", rejected_log_ratio, chosen.shape, chosen.device
    )
    beta = per_unit("clipped_step_dpo: beta", beta, _BETA, chosen)
    clip = per_unit("clipped_step_dpo: clip", clip, _SHARE, chosen)
    low, high = _log1p(-clip), _log1p(clip)
    rewards = [beta * clamp(one, low, high) for one in (chosen, rejected)]
    losses = softplus(rewards[1] - rewards[0])
    return PairLosses(losses, *(one.detach() for one in rewards))


def smoothed_preference_scale(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    low: float,
    high: float,
    gamma: float = 10.0,
) -> Tensor:
    """How much a pair's margin weighs under a smoothed preference (SmPO-Diffusion):

        scale = (2 a - 1) gamma = gamma tanh((chosen - rejected) / (2 (high - low)))
        a = softmax of the two scores, (score - low) / (high - low) each, at the chosen one

    Lu et al. 2025, arXiv:2506.02698, where chosen is the sample of the higher score and the loss
    softplus(-scale m): give ``beta=beta * scale`` to ``dpo``.

    Args:
        chosen_scores, rejected_scores: (P,), of a scorer as PickScore; get no gradient.
        low, high: the scorer's range, low < high.
        gamma: positive.

    Returns:
        (P,), float64 where a tensor is and float32 otherwise; negative where the rejected sample
        scores higher.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    chosen = one_a_unit("chosen_scores", chosen_scores)
    rejected = one_a_unit("rejected_scores", rejected_scores, chosen.shape, chosen.device)
    for name, value, domain in (
        ("low", low, Domain()),
        ("high", high, Domain()),
        ("gamma", gamma, Domain(low=0.0)),
    ):
        Hyperparameter(value, domain).check(name, value)
    if not low < high:
        raise ValueError(f"low and high are the ends of a range, got {low} and {high}; low < high")
    return float(gamma) * torch.tanh((chosen - rejected).detach() / (2 * float(high - low)))


def _log1p(value: PerUnit) -> PerUnit:
    return torch.log1p(value) if isinstance(value, Tensor) else math.log1p(value)


def _errors(model_pred: Tensor, target: Tensor) -> Tensor:
    check_predictions(model_pred=model_pred, target=target)
    return squared_error(model_pred, target, reduction="mean")


def _halves(errors: Tensor) -> tuple[Tensor, Tensor]:
    rows = errors.shape[0]
    if rows % 2:
        raise ValueError(
            f"model_pred must have an even number of rows, chosen samples first, got {rows}; cut "
            "micro-batches between pairs"
        )
    return errors[: rows // 2], errors[rows // 2 :]
