# SPDX-License-Identifier: Apache-2.0
"""Policy gradients on a sampler's steps: each is a token whose log-probability is step_log_prob, of
which the token objectives make Flow-GRPO, DanceGRPO and their peers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import objectives
from fastpref.diffusion import step_log_prob, step_log_ratio

B, T, SHAPE = 4, 3, (2, 6)
TIMES = torch.tensor([0.9, 0.7, 0.4, 0.2], dtype=torch.float64)


def flow_step(x: Tensor, velocity: Tensor, s: float, after: float) -> tuple[Tensor, float]:
    """Mean and std of Flow-GRPO's stochastic step of a rectified flow, from noise level s."""
    step, level = after - s, math.sqrt(s / (1 - s)) * 0.7
    mean = x * (1 + level**2 * step / (2 * s))
    mean = mean + velocity * (1 + level**2 * (1 - s) / (2 * s)) * step
    return mean, level * math.sqrt(-step)


def dance_step(x: Tensor, velocity: Tensor, s: float, after: float) -> tuple[Tensor, float]:
    """DanceGRPO's: the score is that of the noise that the velocity implies."""
    step, eta = after - s, 0.3
    noise = x + (1 - s) * velocity
    mean = x + step * velocity + 0.5 * eta**2 * step * noise / s
    return mean, eta * math.sqrt(-step)


STEPS = {"flow_grpo": flow_step, "dance_grpo": dance_step}


class Trajectories:
    """What was sampled, and velocities of the old policy, the reference and the one that trains."""

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.step = STEPS[name]
        self.x, self.old = draw(B, T, *SHAPE), draw(B, T, *SHAPE)
        self.ref = self.old + 0.05 * draw(B, T, *SHAPE)
        self.new = (self.old + 0.1 * draw(B, T, *SHAPE)).requires_grad_()
        mean, std = self.steps(self.old)
        self.sample = mean + std * draw(B, T, *SHAPE)
        self.rewards, self.groups = draw(B), torch.tensor([0, 0, 1, 1])

    def steps(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, ...) means, and stds that broadcast to them."""
        made = [
            self.step(self.x[:, t], velocity[:, t], float(TIMES[t]), float(TIMES[t + 1]))
            for t in range(T)
        ]
        std = torch.tensor([one for _, one in made], dtype=torch.float64)
        return torch.stack([one for one, _ in made], 1), std.view(1, T, 1, 1)

    def log_probs(self, velocity: Tensor) -> Tensor:
        """(B, T), as a user makes them."""
        mean, std = self.steps(velocity)
        each = std.expand(B, T, 1, 1).flatten()
        found = step_log_prob(self.sample.flatten(0, 1), mean.flatten(0, 1), std=each)
        return found.view(B, T)


def by_hand(one: Trajectories, low: float, high: float, beta: float) -> Tensor:
    """The clipped surrogate of densities, and the divergence of two normal distributions."""
    mean, std = one.steps(one.new)
    old, _ = one.steps(one.old)
    ref, _ = one.steps(one.ref)
    y = one.sample
    log_p, log_old = (
        (-((y - m) ** 2) / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2).mean((2, 3))
        for m in (mean, old)
    )
    ratio = torch.exp(log_p - log_old)
    rewards = one.rewards.view(2, 2)
    spread = rewards.std(1, keepdim=True) + 1e-4
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).view(B, 1)
    values = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    kl = ((mean - ref) ** 2).mean((2, 3)) / (2 * std.view(1, T) ** 2)
    return (values + beta * kl).mean()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_policy_gradient(name: str, beta: float) -> None:
    """Value and gradient; some ratios are clipped at the tiny range that means over elements have
    and some are not."""
    one = Trajectories(name)
    advantages = objectives.group_advantages(one.rewards, one.groups)
    clip = 5e-3
    result = objectives.get("grpo", epsilon_low=clip, epsilon_high=clip)(
        one.log_probs(one.new),
        one.log_probs(one.old).detach(),
        mask=torch.ones(B, T),
        advantages=advantages,
    )
    loss = result.losses.mean()
    if beta:  # the exact divergence of two steps of one std
        (mean, std), (ref, _) = one.steps(one.new), one.steps(one.ref)
        mean, ref = mean.flatten(0, 1), ref.flatten(0, 1)
        kl = -step_log_ratio(ref, mean, ref, std=std.expand(B, T, 1, 1).flatten())
        loss = loss + beta * kl.mean()
    want = by_hand(one, clip, clip, beta)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    assert 0 < int(result.is_clipped.sum()) < B * T
    ours, theirs = (torch.autograd.grad(one_loss, one.new)[0] for one_loss in (loss, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "bnpo", "dapo", "gspo", "cispo", "sapo", "gmpo"])
def test_any_objective_of_tokens(name: str) -> None:
    one = Trajectories("flow_grpo")
    result = objectives.get(name, beta=0.1)(
        one.log_probs(one.new),
        one.log_probs(one.old).detach(),
        mask=torch.ones(B, T),
        advantages=one.rewards,
        ref_token_logp=one.log_probs(one.ref),
    )
    (gradient,) = torch.autograd.grad(result.losses.mean(), one.new)
    assert torch.isfinite(gradient).all() and (gradient.flatten(1).norm(dim=1) > 0).all()


def test_on_policy_the_gradient_is_that_of_the_log_probability() -> None:
    one = Trajectories("flow_grpo")
    arguments: dict[str, Any] = {"mask": torch.ones(B, T), "advantages": one.rewards}
    result = objectives.get("grpo")(one.log_probs(one.new), **arguments)
    (gradient,) = torch.autograd.grad(result.losses.mean(), one.new)
    weighed = -(one.rewards[:, None] * one.log_probs(one.new)).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(weighed, one.new)[0])
