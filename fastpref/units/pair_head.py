# SPDX-License-Identifier: Apache-2.0
"""Pairs of log-probabilities to losses, rewards and the metrics that trainers log.

Any pairwise objective runs here. Those of the DPO family, which compare one number a response
through one of three links, run in one compiled operator that also leaves the losses' slopes
(csrc/pair_head.h); everything else, and what traces or transforms the call, is the objective itself
and a few means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import objectives
from .._extension import fake_of, operators_serve
from ..objectives import Objective
from ..objectives.registry import Composite, upcast

LOGISTIC, SQUARE, HINGE = 0, 1, 2  # in the order of csrc/pair_head.h

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class PairResult(NamedTuple):
    losses: Tensor  # (P,)
    chosen_rewards: Tensor  # (P,) detached
    rejected_rewards: Tensor  # (P,) detached
    metrics: dict[str, Tensor]  # 0-dim, detached


class Link(NamedTuple):
    """loss = link(scale gap - shift), where the gap is the chosen response's log-ratio less the
    rejected one's; rewards are ``reward_scale`` times the log-ratio."""

    kind: int
    scale: float
    reward_scale: float
    shift: float = 0.0
    flipped: float = 0.0  # of the logistic: softplus(-m) + flipped m
    gap_per_token: bool = False  # log-ratios divided by the responses' lengths
    rewards_per_token: bool = False

    @property
    def arguments(self) -> tuple[int, float, float, float, float, bool]:
        """The last ones of the operators."""
        own = self.kind, self.scale, self.shift, self.flipped
        return *own, self.reward_scale, self.rewards_per_token


def _dpo(*, beta: float, label_smoothing: float) -> Link:
    return Link(LOGISTIC, beta, beta, flipped=label_smoothing)


def _ipo(*, beta: float, normalize: str) -> Link:
    return Link(SQUARE, 1.0, beta, shift=1 / (2 * beta), gap_per_token=normalize == "mean")


def _hinge(*, beta: float) -> Link:
    return Link(HINGE, beta, beta)


def _simpo(*, beta: float, gamma: float, label_smoothing: float) -> Link:
    return Link(LOGISTIC, beta, beta, gamma, label_smoothing, True, True)


_LINKS: Mapping[Callable[..., Any], Callable[..., Link]] = {
    objectives.dpo: _dpo,
    objectives.ipo: _ipo,
    objectives.hinge: _hinge,
    objectives.simpo: _simpo,
}


def link_of(objective: Objective) -> Link | None:
    """What ``objective`` is to the operator, or None where it is not of the family, or has a
    hyperparameter of one value a pair."""
    if isinstance(objective.function, Composite):
        return None  # torch.compile cannot hash it
    link, values = _LINKS.get(objective.function), objective.hyperparameters
    if link is None or any(isinstance(one, Tensor) for one in values.values()):
        return None
    return link(**values)


def pair_head(
    objective: Objective,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    **extras: Tensor | None,
) -> PairResult:
    """Losses, rewards and metrics of P pairs.

    Args:
        objective: pairwise, with its hyperparameters set.
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: (P,), the
            log-probabilities that the objective takes.
        extras: what else it takes, by name.

    Returns:
        PairResult, float32 (float64 for float64 log-probs). Only ``losses`` carries a gradient.
        The metrics, means over the pairs under the names that TRL logs: rewards of the chosen and
        of the rejected responses, their margin, the share of pairs whose chosen response has the
        larger reward, and the policy's log-probs; 0 of no pairs. No host sync.

    Raises:
        TypeError, ValueError: as the objective does.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    # The operator's means of no pairs are NaN.
    call = _operator_call(objective, logps, extras) if policy_chosen_logps.numel() else None
    if call is None:
        losses, chosen, rejected = objective(*logps, **extras)  # type: ignore[misc]
        measured = torch.stack(_measured(chosen, rejected, *logps[:2]))
        means = (measured.mean(1) if measured.numel() else measured.sum(1)).unbind()
    else:
        losses, rewards, averages = _PairHead.apply(*call, objective)  # type: ignore[no-untyped-call]
        chosen, rejected = rewards.unbind()
        means = averages.unbind()[1:]  # that of the losses carries no gradient
    return PairResult(losses, chosen, rejected, dict(zip(METRICS, means, strict=True)))


def _measured(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_logps: Tensor, rejected_logps: Tensor
) -> tuple[Tensor, ...]:
    """What METRICS are means of."""
    margins = chosen_rewards - rejected_rewards
    accuracies = (margins > 0).to(margins.dtype)
    logps = (chosen_logps.detach().to(margins.dtype), rejected_logps.detach().to(margins.dtype))
    return (chosen_rewards, rejected_rewards, margins, accuracies, *logps)


class _Call(NamedTuple):
    """The operator's arguments."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    link: Link


def _operator_call(
    objective: Objective, logps: tuple[Tensor | None, ...], extras: dict[str, Tensor | None]
) -> _Call | None:
    """The operator's call, or None where the objective itself must run."""
    link = link_of(objective)
    lengths = [extras.get("chosen_lengths"), extras.get("rejected_lengths")]
    if link is None or not operators_serve(*logps, *lengths):
        return None
    if any(name not in objective.extras for name in extras):
        return None  # which the objective refuses
    objective.check(logps, extras)  # what is set was checked when it was
    if not link.gap_per_token:
        lengths = [None, None]
    elif any(one is None or one.is_floating_point() for one in lengths):
        return None
    given = [None if one is None else upcast(one) for one in logps]
    if len({one.dtype for one in given if one is not None}) != 1:
        return None
    counts = [None if one is None else one.long().contiguous() for one in lengths]
    return _Call(*given, *counts, link)  # type: ignore[call-arg, arg-type]


@fake_of("fastpref::pair_head")
def _pair_head(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    link: int,
    scale: float,
    shift: float,
    flipped: float,
    reward_scale: float,
    rewards_per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = torch.empty_like(policy_chosen_logps, memory_format=torch.contiguous_format)
    rewards = losses.new_empty((2, *losses.shape))
    means = losses.new_empty((1 + len(METRICS),))
    return losses, rewards, torch.empty_like(rewards), means


class _PairHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy_chosen: Tensor,
        policy_rejected: Tensor,
        ref_chosen: Tensor | None,
        ref_rejected: Tensor | None,
        chosen_lengths: Tensor | None,
        rejected_lengths: Tensor | None,
        link: Link,
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
        arguments = (*logps, chosen_lengths, rejected_lengths)
        losses, rewards, slopes, means = torch.ops.fastpref.pair_head(*arguments, *link.arguments)
        ctx.save_for_backward(slopes, *arguments)
        ctx.objective = objective
        ctx.mark_non_differentiable(rewards, means)
        return losses, rewards, means

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *arguments = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _gradients_of(ctx.objective, arguments, grad_losses)
        else:
            chosen, rejected = (slopes * grad_losses).unbind()
            of_chosen, of_rejected = ctx.needs_input_grad[2:4]
            references = -chosen if of_chosen else None, -rejected if of_rejected else None
            gradients = (chosen, rejected, *references)
        return *gradients, None, None, None, None


def _gradients_of(
    objective: Objective, arguments: list[Tensor | None], grad_losses: Tensor
) -> tuple[Tensor | None, ...]:
    """By the objective itself, which is differentiable as often as is wanted."""
    # Of aliases: with respect to the log-probs themselves these would be total derivatives, wrong
    # where one is computed from another.
    *logps, chosen_lengths, rejected_lengths = (
        None if one is None else one.view_as(one) for one in arguments
    )
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    extras = {name: lengths[name] for name in objective.extras}
    losses = objective(*logps, **extras).losses
    inputs = [one for one in logps if one is not None and one.requires_grad]
    found = iter(torch.autograd.grad(losses, inputs, grad_losses, create_graph=True))
    return tuple(next(found) if one is not None and one.requires_grad else None for one in logps)
